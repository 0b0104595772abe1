"""Charts of router.jsonl: expert load, MaxVio and bias by layer, as heat maps and curves.

A layer has its number in the model (`blocks.3` is layer 3), so dense layers before it count.

Shapes: N entries of router.jsonl, M MoE layers, E experts.
"""

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from trinity.reporting import axes
from trinity.reporting.curves import RenderedChart, RenderedSection, line_mode
from trinity.reporting.downsample import downsample, evenly_spaced
from trinity.reporting.run_log import ROUTER_FIELDS, Router, RunLog

SLIDER_ENTRIES = 9
"""Entries of the load's slider, evenly spaced with the first, middle and last. Not from the report."""
MAX_LAYER_POINTS = 400
"""Points of a curve in a chart with a curve for each layer. Not from the report."""
MAX_COLUMNS = 300
"""Columns of a heat map over time. Not from the report."""
MAX_IN_LEGEND = 8
CURVE_FIELDS = ("entropy", "bias_range", "bias_step_norm")
EXPERT_AXES = "a row for each MoE layer, by its number in the model; a column for each expert"
TITLES = {
    "max_violation": "MaxVio by layer",
    "dead": "Share of experts without a token, by layer",
    "entropy": "Router entropy by layer, nats",
    "bias_range": "Expert bias by layer: largest − smallest",
    "bias_step_norm": "Step of the expert bias by layer: norm",
}


def render_router_charts(run: RunLog) -> RenderedSection:
    """All charts of a run's routers; "router.jsonl" is listed as missing if the run has none."""
    router = run.router
    if router is None:
        return RenderedSection([], ["router.jsonl"], [])
    section = RenderedSection([expert_load(router)], [], [])
    by_field = {name: router.by_layer(name) for name in ROUTER_FIELDS}
    for name in ("max_violation", "dead", *CURVE_FIELDS):
        values_MN = by_field[name]
        if not np.isfinite(values_MN).any():
            continue
        if not np.nan_to_num(values_MN).any():
            section.zero.append(TITLES[name])
            continue
        render = layer_curves if name in CURVE_FIELDS else layer_heatmap
        section.charts.append(render(router, values_MN, TITLES[name]))
    last = len(router.offsets) - 1
    bias_ME = router.matrix(last, "bias")
    title = f"Expert bias after step {router.columns.steps[last]}"
    if bias_ME is not None and not np.nan_to_num(bias_ME).any():
        section.zero.append(title)
    elif bias_ME is not None:
        heatmap = _expert_heatmap(router, bias_ME, "bias", colorscale="RdBu", zmid=0)
        section.charts.append(RenderedChart(title, EXPERT_AXES, go.Figure(heatmap, _integer_ticks(*bias_ME.shape))))
    return section


def expert_load(router: Router) -> RenderedChart:
    """Heat map of each expert's load as a multiple of an even share, with a slider over the run."""
    figure = go.Figure()
    entries = evenly_spaced(len(router.offsets), SLIDER_ENTRIES)
    for entry in entries:
        load_ME = router.matrix(entry, "load")
        assert load_ME is not None, "read_run keeps entries with a load only"
        heatmap = _expert_heatmap(router, load_ME * load_ME.shape[1], "load", colorscale="Viridis", zmin=0, zmax=2)
        heatmap.update(name=f"step {router.columns.steps[entry]}", visible=entry == entries[-1])
        figure.add_trace(heatmap)
        figure.update_layout(_integer_ticks(*load_ME.shape))
    steps = [
        {
            "label": str(router.columns.steps[entry]),
            "method": "restyle",
            "args": [{"visible": [other == entry for other in entries]}],
        }
        for entry in entries
    ]
    if len(entries) > 1:
        slider = {"active": len(entries) - 1, "steps": steps, "currentvalue": {"prefix": "step "}, "pad": {"t": 55}}
        figure.update_layout(sliders=[slider])
    note = "1 is an even share of the layer's routed tokens; colours end at 2."
    return RenderedChart("Load of each expert", EXPERT_AXES, figure, note)


def layer_heatmap(router: Router, values_MN: np.ndarray, title: str) -> RenderedChart:
    """A heat map over time: a row for each layer, a column for each entry, or for the maximum of several entries.

    A column extends from the previous column's last entry to its own last entry; the first begins at 0.
    """
    x_N = axes.x_values(router.columns)
    entries = np.array_split(np.arange(len(x_N)), min(len(x_N), MAX_COLUMNS))
    z = np.stack([np.fmax.reduce(values_MN[:, group], axis=1) for group in entries], axis=1)  # fmax ignores NaN
    ends = [group[-1] for group in entries]
    heatmap = go.Heatmap(
        z=z, x=np.append(0, x_N[ends]), y=router.first + np.arange(router.layers),
        customdata=np.tile(np.array(router.columns.steps)[ends], (router.layers, 1)),
        colorscale="Viridis", zmin=0, zmax=max(np.nanmax(z), 1e-3),
        hovertemplate="layer %{y}<br>step %{customdata}: %{z:.4g}<extra></extra>",
    )  # fmt: skip
    note = f"Each column is the maximum of about {len(x_N) // len(entries)} entries." if len(entries) < len(x_N) else ""
    figure = go.Figure(heatmap, _integer_ticks(router.layers) | axes.layout([router.columns]))
    return RenderedChart(title, f"a row for each MoE layer, by {axes.x_label([router.columns])}", figure, note)


def layer_curves(router: Router, values_MN: np.ndarray, title: str) -> RenderedChart:
    """A curve for each layer, coloured by depth."""
    x_N = axes.x_values(router.columns)
    figure = go.Figure(layout={"yaxis": {"rangemode": "nonnegative"}} | axes.layout([router.columns]))
    downsampled = False
    for layer, y_N in enumerate(values_MN):
        points = downsample(y_N, MAX_LAYER_POINTS)
        downsampled |= len(points) < np.isfinite(y_N).sum()
        colour = sample_colorscale("Viridis", [0.9 * layer / max(router.layers - 1, 1)])[0]
        name = f"layer {router.first + layer}"
        figure.add_scatter(
            x=x_N[points], y=y_N[points], mode=line_mode(len(points)), name=name, meta=name,
            line={"color": colour, "width": 1.5}, customdata=np.array(router.columns.steps)[points],
            showlegend=router.layers <= MAX_IN_LEGEND, hovertemplate="step %{customdata}<br>%{x:,}: %{y:.4g}",
        )  # fmt: skip
    note = f"Downsampled to {MAX_LAYER_POINTS} points a layer." if downsampled else ""
    depth = "" if router.layers <= MAX_IN_LEGEND else "Dark: near the input; light: near the output."
    notes = " ".join(filter(None, (depth, note)))
    return RenderedChart(title, f"a curve for each MoE layer, by {axes.x_label([router.columns])}", figure, notes)


def _expert_heatmap(router: Router, z_ME: np.ndarray, quantity: str, **options: object) -> go.Heatmap:
    """A row for each layer, a column for each expert; float32 is finer than the colours."""
    hover = "layer %{y}, expert %{x}<br>" + quantity + " %{z:.4g}<extra>%{fullData.name}</extra>"
    layers_M = router.first + np.arange(len(z_ME))
    return go.Heatmap(z=z_ME.astype(np.float32), y=layers_M, hovertemplate=hover, **options)


def _integer_ticks(rows: int, columns: int = MAX_COLUMNS) -> dict:
    """A tick for each layer or expert if there are few; plotly would set ticks at halves, the first at -0.5."""
    return {axis: {"dtick": 1} for axis, count in (("yaxis", rows), ("xaxis", columns)) if count <= 10}
