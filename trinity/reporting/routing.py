"""What the routers of one run did, layer by layer: router.jsonl as heat maps and paths.

Layers have their number in the model (blocks.3 of its names is layer 3), so the dense ones before them count.

Shapes: N entries of router.jsonl, M MoE layers, E experts.
"""

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from trinity.reporting import axes
from trinity.reporting.curves import Drawn, Picture, mode
from trinity.reporting.downsample import moments, thin
from trinity.reporting.run_log import ROUTER_FIELDS, Router, RunLog

MOMENTS = 9
"""Entries of the load's slider: the first, the last, and evenly between them, the middle one too. Ours."""
LAYER_POINTS = 400
"""Points of a curve where each layer has one. Ours."""
MOST_COLUMNS = 300
"""Of a heat map over time. Ours."""
MOST_IN_LEGEND = 8
PATHS = ("entropy", "bias_range", "bias_step_norm")
EXPERT_AXES = "a row a MoE layer, by its number in the model; a column an expert"
WORDS = {
    "max_violation": "MaxVio by layer",
    "dead": "Share of experts without a token, by layer",
    "entropy": "Router entropy by layer, nats",
    "bias_range": "Expert bias by layer: largest − smallest",
    "bias_step_norm": "Step of the expert bias by layer: norm",
}


def router_pictures(run: RunLog) -> Drawn:
    """Every picture of a run's routers; "router.jsonl" is missing where there is none."""
    router = run.router
    if router is None:
        return Drawn([], ["router.jsonl"], [])
    drawn = Drawn([loads(router)], [], [])
    known = {name: router.by_layer(name) for name in ROUTER_FIELDS}
    for name in ("max_violation", "dead", *PATHS):
        values_MN = known[name]
        if not np.isfinite(values_MN).any():
            continue
        if not np.nan_to_num(values_MN).any():
            drawn.zero.append(WORDS[name])
            continue
        draw = paths if name in PATHS else over_time
        drawn.pictures.append(draw(router, values_MN, WORDS[name]))
    last = len(router.offsets) - 1
    bias_ME = router.matrix(last, "bias")
    title = f"Expert bias after step {router.columns.steps[last]}"
    if bias_ME is not None and not np.nan_to_num(bias_ME).any():
        drawn.zero.append(title)
    elif bias_ME is not None:
        heat = _experts(router, bias_ME, "bias", colorscale="RdBu", zmid=0)
        drawn.pictures.append(Picture(title, EXPERT_AXES, go.Figure(heat, _whole_ticks(*bias_ME.shape))))
    return drawn


def loads(router: Router) -> Picture:
    """Load of each layer and expert, as a multiple of an even share, with a slider over the run."""
    figure = go.Figure()
    shown = moments(len(router.offsets), MOMENTS)
    for entry in shown:
        load_ME = router.matrix(entry, "load")
        assert load_ME is not None, "read_run keeps entries with a load only"
        times = _experts(router, load_ME * load_ME.shape[1], "load", colorscale="Viridis", zmin=0, zmax=2)
        times.update(name=f"step {router.columns.steps[entry]}", visible=entry == shown[-1])
        figure.add_trace(times)
        figure.update_layout(_whole_ticks(*load_ME.shape))
    steps = [
        {
            "label": str(router.columns.steps[entry]),
            "method": "restyle",
            "args": [{"visible": [other == entry for other in shown]}],
        }
        for entry in shown
    ]
    if len(shown) > 1:
        slider = {"active": len(shown) - 1, "steps": steps, "currentvalue": {"prefix": "step "}, "pad": {"t": 55}}
        figure.update_layout(sliders=[slider])
    note = "1 is an even share of its layer's choices; colours end at 2."
    return Picture("Load of each expert", EXPERT_AXES, figure, note)


def over_time(router: Router, values_MN: np.ndarray, title: str) -> Picture:
    """A heat map: a row a layer, a column an entry (the highest of several where there are many).

    A column reaches from the entry before to its own, the first one from 0.
    """
    x_N = axes.positions(router.columns)
    entries = np.array_split(np.arange(len(x_N)), min(len(x_N), MOST_COLUMNS))
    z = np.stack([np.fmax.reduce(values_MN[:, some], axis=1) for some in entries], axis=1)  # passes over NaN
    ends = [some[-1] for some in entries]
    heat = go.Heatmap(
        z=z, x=np.append(0, x_N[ends]), y=router.first + np.arange(router.layers),
        customdata=np.tile(np.array(router.columns.steps)[ends], (router.layers, 1)),
        colorscale="Viridis", zmin=0, zmax=max(np.nanmax(z), 1e-3),
        hovertemplate="layer %{y}<br>step %{customdata}: %{z:.4g}<extra></extra>",
    )  # fmt: skip
    note = f"Each column is the highest of about {len(x_N) // len(entries)} entries." if len(entries) < len(x_N) else ""
    figure = go.Figure(heat, _whole_ticks(router.layers) | axes.layout([router.columns]))
    return Picture(title, f"a row a MoE layer, by {axes.words([router.columns])}", figure, note)


def paths(router: Router, values_MN: np.ndarray, title: str) -> Picture:
    """A curve a layer, coloured by depth."""
    x_N = axes.positions(router.columns)
    figure, thinned = go.Figure(layout={"yaxis": {"rangemode": "nonnegative"}} | axes.layout([router.columns])), False
    for layer, y_N in enumerate(values_MN):
        drawn = thin(y_N, LAYER_POINTS)
        thinned |= len(drawn) < np.isfinite(y_N).sum()
        colour = sample_colorscale("Viridis", [0.9 * layer / max(router.layers - 1, 1)])[0]
        name = f"layer {router.first + layer}"
        figure.add_scatter(
            x=x_N[drawn], y=y_N[drawn], mode=mode(len(drawn)), name=name, meta=name,
            line={"color": colour, "width": 1.5}, customdata=np.array(router.columns.steps)[drawn],
            showlegend=router.layers <= MOST_IN_LEGEND, hovertemplate="step %{customdata}<br>%{x:,}: %{y:.4g}",
        )  # fmt: skip
    note = f"Thinned to {LAYER_POINTS} points a layer." if thinned else ""
    depth = "" if router.layers <= MOST_IN_LEGEND else "Dark: near the input; light: near the output."
    notes = " ".join(filter(None, (depth, note)))
    return Picture(title, f"a curve a MoE layer, by {axes.words([router.columns])}", figure, notes)


def _experts(router: Router, z_ME: np.ndarray, word: str, **options: object) -> go.Heatmap:
    """A row a layer, a column an expert; float32 is more than a colour shows."""
    words = "layer %{y}, expert %{x}<br>" + word + " %{z:.4g}<extra>%{fullData.name}</extra>"
    layers_M = router.first + np.arange(len(z_ME))
    return go.Heatmap(z=z_ME.astype(np.float32), y=layers_M, hovertemplate=words, **options)


def _whole_ticks(rows: int, columns: int = MOST_COLUMNS) -> dict:
    """A tick for each of a few layers or experts; plotly would put some at halves, and the first at -0.5."""
    return {axis: {"dtick": 1} for axis, count in (("yaxis", rows), ("xaxis", columns)) if count <= 10}
