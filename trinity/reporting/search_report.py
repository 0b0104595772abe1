"""The page of a search: history, objectives, parameters, and the Pareto front."""

import math
from html import escape
from itertools import accumulate, combinations
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from trinity.merging.search.result import BEST, Found
from trinity.merging.search.search_file import Objective
from trinity.reporting.curves import COLOURS, MARK_COLOUR, RenderedChart, escaped
from trinity.reporting.page import Section, render_page
from trinity.reporting.tables import ABSENT, table
from trinity.terminal import format_duration

MAX_PAIRS = 6
"""Most pairs of objectives with a chart of their front. Not from the report."""
BY_TRIAL = "by trial"


def search_page(found: Found, folder: Path) -> str:
    """The page as HTML.

    Args:
        folder: of the search.
    Raises:
        UserError: plotly is not installed.
    """
    sections = [
        Section("Summary", html=_summary(found)),
        Section("Models and best merge", html=_models_table(found)),
        Section("History", [_history_chart(found), *(_objective_chart(found, each) for each in found.objectives)]),
        Section("Parameters", [_parameter_chart(found), *_scatter_charts(found)], _variables_table(found)),
    ]
    if len(found.counted) > 1:
        pairs = list(combinations(found.counted, 2))[:MAX_PAIRS]
        charts = [_front_chart(found, first, second) for first, second in pairs]
        sections.append(Section("Pareto front", charts, _front_table(found)))
    recipe = (folder / BEST).read_text(encoding="utf-8")
    sections.append(Section("Best recipe", html=f"<pre>{escape(recipe)}</pre>"))
    return render_page(f"Search: {folder}", sections)


def _summary(found: Found) -> str:
    failed = sum(trial.error is not None for trial in found.trials)
    rows = {
        "trials": f"{len(found.trials):,}" + (f", of which {failed:,} gave no model" if failed else ""),
        "variables": f"{len(found.variables):,}",
        "time of the trials": format_duration(found.seconds),
        "ended because": found.stopped,
        "best trial": f"{found.best.number:,}",
        "cost of the best trial": _number(found.best.cost),
        "cost of the start": _number(found.trials[0].cost),
        "cost": " ".join(
            f"{'-' if each.maximize else '+'} {each.weight:g} · {each.name} ({each.metric})" for each in found.counted
        ),
    }
    return table(["", ""], [[name, value] for name, value in rows.items()])


def _models_table(found: Found) -> str:
    columns = {**found.models, "start": found.trials[0].objectives, "best merge": found.best.objectives}
    rows = [
        [f"{each.name}: {each.metric}", *(_number(values.get(each.name)) for values in columns.values())]
        for each in found.objectives
    ]
    return table(["", *columns], rows)


def _variables_table(found: Found) -> str:
    rows = [
        [v.name, _number(v.low), _number(v.high), _number(v.start), _number(value)]
        for v, value in zip(found.variables, found.best.values)
    ]
    return table(["variable", "low", "high", "start", "best"], rows)


def _history_chart(found: Found) -> RenderedChart:
    costs = [trial.cost for trial in found.trials]
    figure = go.Figure()
    _add_points(figure, found, costs, "trial")
    figure.add_scatter(
        x=list(range(len(costs))), y=_finite(accumulate(costs, min)), mode="lines", name="best so far",
        line={"color": COLOURS[1], "width": 2, "shape": "hv"}, hovertemplate="trial %{x}: %{y:.5g}",
    )  # fmt: skip
    return RenderedChart("Cost", f"cost, {BY_TRIAL}", figure, "What is minimised: the weighted sum of the objectives.")


def _objective_chart(found: Found, objective: Objective) -> RenderedChart:
    figure = go.Figure()
    _add_points(figure, found, [trial.objectives.get(objective.name, math.nan) for trial in found.trials], "trial")
    for number, (label, values) in enumerate(found.models.items()):
        if objective.name in values:
            figure.add_scatter(
                x=[0, max(1, len(found.trials) - 1)], y=[values[objective.name]] * 2, mode="lines",
                name=escaped(label, 60), meta=escaped(label, 60),
                line={"color": COLOURS[(number + 2) % len(COLOURS)], "width": 1.5, "dash": "dash"},
                hovertemplate="%{y:.5g}",
            )  # fmt: skip
    return RenderedChart(objective.name, f"{objective.metric}, {BY_TRIAL}; dashed: the models", figure)


def _parameter_chart(found: Found) -> RenderedChart:
    """A row for each variable, a column for each trial."""
    z = np.array([[v.share_of(trial.values[at]) for trial in found.trials] for at, v in enumerate(found.variables)])
    heatmap = go.Heatmap(
        z=z.astype(np.float32), y=[escaped(v.name, 60) for v in found.variables], colorscale="Viridis", zmin=0, zmax=1,
        hovertemplate="trial %{x}, %{y}: %{z:.3f} of the bounds<extra></extra>",
    )  # fmt: skip
    layout = {"yaxis": {"autorange": "reversed", "showgrid": False}, "xaxis": {"showgrid": False}}
    axes = "a row for each variable, a column for each trial"
    return RenderedChart("Variables", axes, go.Figure(heatmap, layout), "0 is the lower bound, 1 the upper one.")


def _scatter_charts(found: Found) -> list[RenderedChart]:
    """Cost by the value of a variable, for few variables."""
    charts = []
    for at, variable in enumerate(found.variables[:MAX_PAIRS]):
        figure = go.Figure()
        values, costs = [trial.values[at] for trial in found.trials], _finite(trial.cost for trial in found.trials)
        figure.add_scatter(
            x=values, y=costs, mode="markers", name="trial", hovertemplate="%{x:.4g}: %{y:.5g}",
            marker={"color": list(range(len(costs))), "colorscale": "Viridis", "size": 6},
        )  # fmt: skip
        figure.add_scatter(
            x=[found.best.values[at]], y=[found.best.cost], mode="markers", name="best",
            marker={"color": MARK_COLOUR, "size": 10, "symbol": "diamond"}, hovertemplate="%{x:.4g}: %{y:.5g}",
        )  # fmt: skip
        charts.append(
            RenderedChart(variable.name, "cost, by the value; colours from the first trial to the last", figure)
        )
    return charts


def _front_chart(found: Found, first: Objective, second: Objective) -> RenderedChart:
    figure = go.Figure()
    both = [first.name, second.name]
    done = [trial for trial in found.trials if trial.objectives]
    groups = {"trials": done, "Pareto front": found.front, "best": [found.best]}
    markers = ({"color": COLOURS[7], "size": 5}, {"color": COLOURS[0], "size": 8}, {"color": MARK_COLOUR, "size": 11})
    for (name, trials), marker in zip(groups.items(), markers):
        x, y = ([trial.objectives[each] for trial in trials] for each in both)
        numbers = [str(trial.number) for trial in trials]
        figure.add_scatter(
            x=x, y=y, mode="markers", name=name, marker=marker, text=numbers,
            hovertemplate="trial %{text}: %{x:.5g}, %{y:.5g}",
        )  # fmt: skip
    for number, (label, values) in enumerate(found.models.items()):
        if all(name in values for name in both):
            figure.add_scatter(
                x=[values[first.name]], y=[values[second.name]], mode="markers", name=escaped(label, 60),
                marker={"color": COLOURS[(number + 2) % len(COLOURS)], "size": 10, "symbol": "square"},
                hovertemplate="%{x:.5g}, %{y:.5g}",
            )  # fmt: skip
    title = f"{first.name} and {second.name}"
    note = "The trials that no other beats in one objective without being worse in another; squares are the models."
    return RenderedChart(title, f"{second.name} ({second.metric}), by {first.name} ({first.metric})", figure, note)


def _front_table(found: Found) -> str:
    rows = [
        [f"{trial.number}", *(_number(trial.objectives[each.name]) for each in found.objectives)]
        for trial in found.front
    ]
    return table(["trial", *(each.name for each in found.objectives)], rows)


def _add_points(figure: go.Figure, found: Found, values: list[float], name: str) -> None:
    figure.add_scatter(
        x=list(range(len(values))), y=_finite(values), mode="markers", name=name, meta=name,
        marker={"color": COLOURS[0], "size": 5}, hovertemplate="trial %{x}: %{y:.5g}",
    )  # fmt: skip
    best = found.best.number
    figure.add_scatter(
        x=[best], y=[values[best]], mode="markers", name="best", meta="best", hovertemplate="trial %{x}: %{y:.5g}",
        marker={"color": MARK_COLOUR, "size": 10, "symbol": "diamond"},
    )  # fmt: skip


def _finite(values: object) -> list[float | None]:
    """For a chart, which leaves a gap at None."""
    return [value if math.isfinite(value) else None for value in values]  # type: ignore[attr-defined]


def _number(value: float | None) -> str:
    return ABSENT if value is None or not math.isfinite(value) else f"{value:.6g}"
