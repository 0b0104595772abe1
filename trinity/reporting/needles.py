"""Heat maps of needles in a haystack: the score by length and by depth of the asked needle."""

from itertools import groupby
from typing import Any

import plotly.graph_objects as go

from trinity.reporting.curves import RenderedChart, RenderedSection
from trinity.reporting.run_log import RunLog

AXES = "columns: tokens of the sample; rows: depth of the asked needle, 0 % at the beginning"


def render_needle_charts(run: RunLog) -> RenderedSection:
    """A heat map for each kind, of the last step with needles; "needles.jsonl" is missing if the run has none."""
    if not run.needles:
        return RenderedSection([], ["needles.jsonl"], [])
    last = run.needles[-1]["step"]
    cells = [cell for cell in run.needles if cell["step"] == last]
    return RenderedSection(needle_charts(cells, f", step {last:,}"), [], [])


def needle_charts(cells: list[dict[str, Any]], when: str = "") -> list[RenderedChart]:
    """A heat map for each kind of needles.

    Args:
        cells: each with kind, length, score, error, nats, samples and by_depth: score of each range of depth, or None.
        when: what comes after the title.
    """
    by_kind = groupby(sorted(cells, key=lambda cell: (cell["kind"], cell["length"])), key=lambda cell: cell["kind"])
    return [_heatmap(f"MK-NIAH {kind}{when}", list(group)) for kind, group in by_kind]


def _heatmap(title: str, cells: list[dict[str, Any]]) -> RenderedChart:
    strata = len(cells[0]["by_depth"])
    z = [[cell["by_depth"][stratum] for cell in cells] for stratum in range(strata)]
    depths = [f"{100 * s // strata}–{100 * (s + 1) // strata} %" for s in range(strata)]
    heatmap = go.Heatmap(
        z=z, x=[f"{cell['length']:,}" for cell in cells], y=depths, colorscale="RdYlGn", zmin=0, zmax=1, xgap=2, ygap=2,
        hovertemplate="%{x} tokens, depth %{y}: %{z:.3f}<extra></extra>",
    )  # fmt: skip
    # names, not numbers: plotly would space 4,096 and 8,192 by their values
    layout = {"xaxis": {"type": "category"}, "yaxis": {"type": "category", "autorange": "reversed"}}
    scores = (f"{cell['length']:,}: {cell['score']:.3f} ± {cell['error']:.3f}" for cell in cells)
    note = f"Score ± standard error of {cells[0]['samples']} samples: {'; '.join(scores)}."
    return RenderedChart(title, AXES, go.Figure(heatmap, layout), note)
