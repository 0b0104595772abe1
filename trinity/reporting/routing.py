"""What the routers of one run did, layer by layer: router.jsonl as heat maps and paths.

Shapes: N entries of router.jsonl, M MoE layers, E experts.
"""

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from trinity.reporting.curves import Picture
from trinity.reporting.run import ROUTER_FIELDS, Router, Run
from trinity.reporting.thinning import thin

MOMENTS = 9
"""Entries of the load's slider: the first, the last, and evenly between them, the middle one too. Ours."""
LAYER_POINTS = 400
"""Points of a curve where each layer has one. Ours."""
MOST_COLUMNS = 300
"""Of a heat map over time. Ours."""
MOST_IN_LEGEND = 8
PATHS = ("entropy", "bias_range", "bias_step_norm")
EXPERT_AXES = "a row a MoE layer, a column an expert"
WORDS = {
    "max_violation": "MaxVio by layer",
    "dead": "Share of experts without a token, by layer",
    "entropy": "Router entropy by layer, nats",
    "bias_range": "Expert bias by layer: largest − smallest",
    "bias_step_norm": "Step of the expert bias by layer: norm",
}


def router_pictures(run: Run) -> list[Picture]:
    """Every picture of a run's routers; none without router.jsonl."""
    router = run.router
    if router is None:
        return []
    drawn = [loads(router)]
    known = {name: router.by_layer(name) for name in ROUTER_FIELDS}
    known = {name: values for name, values in known.items() if np.isfinite(values).any()}
    drawn += [over_time(router, known[name], WORDS[name]) for name in ("max_violation", "dead") if name in known]
    drawn += [paths(router, known[name], WORDS[name]) for name in PATHS if name in known]
    last = len(router.offsets) - 1
    bias_ME = router.matrix(last, "bias")
    if bias_ME is not None:
        title = f"Expert bias after step {router.columns.steps[last]}"
        drawn.append(
            Picture(
                title,
                EXPERT_AXES,
                go.Figure(_experts(bias_ME, "bias", colorscale="RdBu", zmid=0), _whole_ticks(router.layers)),
            )
        )
    return drawn


def moments(entries: int) -> list[int]:
    """Which entries the slider shows, ascending: at most MOMENTS, the first, the middle and the last among them."""
    return sorted({round(place) for place in np.linspace(0, entries - 1, MOMENTS).tolist()})


def loads(router: Router) -> Picture:
    """Load of each layer and expert, as a multiple of an even share, with a slider over the run."""
    figure = go.Figure(layout=_whole_ticks(router.layers))
    shown = moments(len(router.offsets))
    for entry in shown:
        load_ME = router.matrix(entry, "load")
        assert load_ME is not None, "read_run keeps entries with a load only"
        times = _experts(load_ME * load_ME.shape[1], "load", colorscale="Viridis", zmin=0, zmax=2)
        times.update(name=f"step {router.columns.steps[entry]}", visible=entry == shown[-1])
        figure.add_trace(times)
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
    """A heat map: a row a layer, a column an entry (the highest of several where there are many)."""
    x_N, unit = _axis(router)
    entries = np.array_split(np.arange(len(x_N)), min(len(x_N), MOST_COLUMNS))
    z = np.stack([np.fmax.reduce(values_MN[:, some], axis=1) for some in entries], axis=1)  # passes over NaN
    heat = go.Heatmap(
        z=z, x=x_N[[some[-1] for some in entries]], y=np.arange(router.layers),
        colorscale="Viridis", zmin=0, zmax=max(np.nanmax(z), 1e-3),
        hovertemplate="MoE layer %{y}<br>%{x:.4s} " + unit + ": %{z:.4g}<extra></extra>",
    )  # fmt: skip
    note = f"Each column is the highest of about {len(x_N) // len(entries)} entries." if len(entries) < len(x_N) else ""
    return Picture(title, f"a row a MoE layer, by {unit}", go.Figure(heat, _whole_ticks(router.layers)), note)


def paths(router: Router, values_MN: np.ndarray, title: str) -> Picture:
    """A curve a layer, coloured by depth."""
    x_N, unit = _axis(router)
    figure, thinned = go.Figure(layout={"yaxis": {"rangemode": "nonnegative"}}), False
    for layer, y_N in enumerate(values_MN):
        drawn = thin(y_N, LAYER_POINTS)
        thinned |= len(drawn) < np.isfinite(y_N).sum()
        colour = sample_colorscale("Viridis", [0.9 * layer / max(router.layers - 1, 1)])[0]
        figure.add_scatter(
            x=x_N[drawn], y=y_N[drawn], mode="lines", name=f"layer {layer}", meta=f"layer {layer}",
            line={"color": colour, "width": 1.5},
            showlegend=router.layers <= MOST_IN_LEGEND, hovertemplate="%{x:.4s}: %{y:.4g}",
        )  # fmt: skip
    note = f"Thinned to {LAYER_POINTS} points a layer." if thinned else ""
    depth = "" if router.layers <= MOST_IN_LEGEND else "Dark: near the input; light: near the output."
    return Picture(title, f"a curve a MoE layer, by {unit}", figure, " ".join(filter(None, (depth, note))))


def _axis(router: Router) -> tuple[np.ndarray, str]:
    columns = router.columns
    if "tokens" in columns:
        return columns["tokens"], "tokens"
    return np.array(columns.steps, dtype=np.float64), "steps"


def _experts(z_ME: np.ndarray, word: str, **options: object) -> go.Heatmap:
    """A row a layer, a column an expert; float32 is more than a colour shows."""
    words = "MoE layer %{y}, expert %{x}<br>" + word + " %{z:.4g}<extra>%{fullData.name}</extra>"
    return go.Heatmap(z=z_ME.astype(np.float32), hovertemplate=words, **options)


def _whole_ticks(layers: int) -> dict:
    """A few layers get a tick each; plotly would put some at halves."""
    return {"yaxis": {"dtick": 1}} if layers <= 10 else {}
