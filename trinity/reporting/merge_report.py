"""The page of a merge: what differs between the models and the result by layer and part, routers, and figures on text.

In the style of the run report: heat maps with a row for each part and a column for each layer, curves by layer, tables.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html import escape
from itertools import combinations

import numpy as np
import plotly.graph_objects as go

from trinity.merging.plan import Plan
from trinity.merging.statistics import BIAS, MERGED, OUTSIDE, PARTS, ROUTER, Place, Statistics, Sums
from trinity.merging.validation import Figures
from trinity.reporting.curves import COLOURS, RenderedChart, escaped
from trinity.reporting.page import Section, render_page
from trinity.reporting.tables import ABSENT, table

MAX_PAIRS = 6
"""Most pairs of models with a heat map of their cosines; further ones are in the table only. Not from the report."""
PART_AXES = "a row for each part of a layer, a column for each layer; empty where a layer has no such part"
LAYER_AXES = "by layer, with its number in the model"
METRICS = {
    "loss": "loss, nats per token",
    "bits_per_byte": "bits per byte",
    "max_violation": "MaxVio, worst layer",
    "max_violation_mean": "MaxVio, mean of the layers",
    "dead_experts": "dead experts, share",
}


@dataclass
class MergeResults:
    """What the page shows.

    figures: label of a model → name of a text → its figures.
    recalibrated: title → value before and after; empty without recalibration.
    notes: remarks for the reader.
    """

    plan: Plan
    folder: str
    statistics: Statistics
    figures: dict[str, dict[str, Figures]] = field(default_factory=dict)
    recalibrated: dict[str, tuple[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def merge_page(results: MergeResults) -> str:
    """The page as HTML.

    Raises:
        UserError: plotly is not installed.
    """
    found = results.statistics
    labels = list(dict.fromkeys([MERGED, found.reference, *results.plan.sources, *found.models, *results.figures]))
    sections = [
        Section("Summary", html=_summary(results)),
        Section("Models", html=_models_table(found)),
        Section("Difference by layer and part", list(_norm_charts(found)), _outside_table(found)),
        Section("Agreement by layer and part", list(_agreement_charts(found)), _pairs_table(found)),
    ]
    if any(place.part == ROUTER for place in found.sums):
        sections.append(Section("Routers", _router_charts(found, labels)))
    if results.figures:
        sections.append(
            Section("Loss and balance on text", _balance_charts(results.figures, labels), _figures_table(results))
        )
    if results.recalibrated:
        rows = [[title, *values] for title, values in results.recalibrated.items()]
        sections.append(Section("Recalibration", html=table(["", "before", "after"], rows)))
    notes = "".join(f"<p>{escape(note)}</p>" for note in results.notes)
    recipe = f"<details><summary>recipe</summary><pre>{escape(results.plan.recipe.text)}</pre></details>"
    sections.append(Section("Recipe and remarks", html=notes + recipe))
    return render_page(f"Merge: {results.folder}", sections)


def _summary(results: MergeResults) -> str:
    plan = results.plan
    methods: dict[str, int] = {}
    for job in plan.jobs:
        methods[job.method] = methods.get(job.method, 0) + 1
    rows = {
        "merged model": results.folder,
        "models": ", ".join(plan.sources),
        "differences are from": results.statistics.reference,
        "methods": ", ".join(f"{name} ({count:,} tensors)" for name, count in methods.items()),
        "layers": f"{len(plan.dense)}, {sum(plan.dense)} dense",
        "parameters": f"{results.statistics.total(lambda place: True).elements:,}",
        "config": plan.donor.label,
        "tokenizer": plan.vocabulary.donor.label,
    }
    return table(["", ""], [[name, value] for name, value in rows.items()])


def _models_table(found: Statistics) -> str:
    """A row for each model: its difference from the reference, over all parameters and by kind."""
    kinds: dict[str, Callable[[Place], bool]] = {
        "all": lambda place: True,
        "attention": lambda place: place.part.startswith("attention"),
        "experts": lambda place: place.expert is not None,
        "routers": lambda place: place.part == ROUTER,
    }
    totals = {name: found.total(keep) for name, keep in kinds.items()}
    totals = {name: sums for name, sums in totals.items() if sums.elements}
    merged = found.vectors[MERGED]
    rows = [
        [
            label,
            *(_number(sums.relative_norm(vector)) for sums in totals.values()),
            ABSENT if vector == merged else _number(totals["all"].cosine(vector, merged)),
        ]
        for label, vector in found.vectors.items()
    ]
    head = ["model", *(f"‖δ‖/‖W‖, {name}" for name in totals), "cosine with the merged δ"]
    explained = (
        f"<p class=note>δ is the difference of a model from {escape(found.reference)}, W the weights of "
        f"{escape(found.reference)}.</p>"
    )
    return explained + table(head, rows)


def _outside_table(found: Statistics) -> str:
    by_part = found.by_part()
    rows = [
        [label, *(_number(by_part[None, part].relative_norm(vector)) for part in OUTSIDE)]
        for label, vector in found.vectors.items()
    ]
    return "<p class=note>Outside of the layers, ‖δ‖/‖W‖:</p>" + table(["model", *OUTSIDE], rows)


def _norm_charts(found: Statistics) -> Iterator[RenderedChart]:
    """‖δ‖/‖W‖ of each model, on one scale; and of the merged model's experts."""
    values = {
        label: _by_part(found, lambda sums, vector=vector: sums.relative_norm(vector))  # type: ignore[misc]
        for label, vector in found.vectors.items()
    }
    weights = np.array([part != BIAS for part in _parts(found)])
    top = max((np.nanmax(z[weights]) for z in values.values() if np.isfinite(z[weights]).any()), default=1.0)
    note = f"‖δ‖/‖W‖. Every model has the same colours, which end at {top:.3g}: the largest value but for biases."
    for label, z in values.items():
        options = {"colorscale": "Viridis", "zmin": 0, "zmax": max(top, 1e-9)}
        yield _part_heatmap(f"Relative difference of {label}", found, z, note, **options)
    by_expert = found.by_expert()
    if by_expert:
        merged = found.vectors[MERGED]
        layers = sorted({layer for layer, _ in by_expert})
        experts = 1 + max(expert for _, expert in by_expert)
        z = np.array([[by_expert[layer, e].relative_norm(merged) for e in range(experts)] for layer in layers])
        hover = "layer %{y}, expert %{x}: %{z:.4g}<extra></extra>"
        colours = {"colorscale": "Viridis", "zmin": 0, "zmax": max(np.nanmax(z, initial=0), 1e-9)}
        heatmap = go.Heatmap(z=z.astype(np.float32), y=layers, hovertemplate=hover, **colours)
        figure = go.Figure(heatmap, _integer_ticks(len(layers), experts))
        axes = "a row for each MoE layer, a column for each expert"
        yield RenderedChart("Relative difference of the merged model's experts", axes, figure, "‖δ‖/‖W‖.")


def _agreement_charts(found: Statistics) -> Iterator[RenderedChart]:
    """Sign conflicts, cosines of pairs of models, and of each model with the merged one."""
    several = len(found.models) > 1
    if several:
        z = _by_part(found, lambda sums: sums.conflict_share)
        note = "Of the entries that a model changed, the share that one model raised and another lowered."
        yield _part_heatmap("Sign conflicts", found, z, note, colorscale="Viridis", zmin=0, zmax=1)
    pairs = list(combinations(found.models, 2))
    pairs = (pairs if len(pairs) <= MAX_PAIRS else []) + [(label, MERGED) for label in found.models]
    for a, b in pairs:
        first, second = found.vectors[a], found.vectors[b]
        z = _by_part(found, lambda sums, i=first, j=second: sums.cosine(i, j))  # type: ignore[misc]
        title = f"Cosine of the differences of {a} and {b}"
        yield _part_heatmap(title, found, z, "", colorscale="RdBu", zmin=-1, zmax=1)


def _pairs_table(found: Statistics) -> str:
    """Cosines of all differences, over all parameters."""
    if len(found.models) < 2:
        return ""
    total = found.total(lambda place: True)
    rows = [
        [a, *(_number(total.cosine(i, j)) if i <= j else "" for j in found.vectors.values())]
        for a, i in found.vectors.items()
    ]
    share = f"<p>Sign conflicts over all parameters: {total.conflict_share:.1%} of the changed entries.</p>"
    return (
        "<p class=note>Cosines of the differences, over all parameters:</p>" + table(["", *found.vectors], rows) + share
    )


def _router_charts(found: Statistics, labels: list[str]) -> list[RenderedChart]:
    """Cosine of each router with the reference's and, for models, with the merged one's, by layer."""
    routers = {place.layer or 0: sums for place, sums in found.sums.items() if place.part == ROUTER}
    merged = found.vectors[MERGED]
    with_reference = {
        label: {layer: sums.weight_cosine(vector, 0) for layer, sums in routers.items()}
        for label, vector in found.vectors.items()
    }
    with_merged = {
        label: {layer: sums.weight_cosine(vector, merged) for layer, sums in routers.items()}
        for label, vector in {found.reference: 0, **found.vectors}.items()
        if label != MERGED
    }
    note = "1: the same up to a factor. Near 0: the experts have another order, or the models no common ancestor."
    return [
        _layer_curves(f"Router correlation with {found.reference}", with_reference, labels, note),
        _layer_curves("Router correlation with the merged model", with_merged, labels, note),
    ]


def _balance_charts(figures: dict[str, dict[str, Figures]], labels: list[str]) -> list[RenderedChart]:
    """MaxVio by layer of each model, for each text."""
    charts = []
    for name in dict.fromkeys(name for each in figures.values() for name in each):
        curves = {
            label: dict(enumerate(each[name].violation_M.tolist(), each[name].first_layer))
            for label, each in figures.items()
            if name in each and len(each[name].violation_M)
        }
        if curves:
            note = "MaxVio: tokens of the fullest expert over the mean, minus 1."
            charts.append(_layer_curves(f"MaxVio by layer, {name}", curves, labels, note, start_at_zero=True))
    return charts


def _figures_table(results: MergeResults) -> str:
    """A row for each text and metric, a column for each model."""
    figures = results.figures
    rows = []
    for name in dict.fromkeys(name for each in figures.values() for name in each):
        metrics = [each[name].metrics if name in each else {} for each in figures.values()]
        for key, words in METRICS.items():
            if any(key in each for each in metrics):
                rows.append([f"{name}: {words}", *(_number(each.get(key), 6) for each in metrics)])
    return table(["", *figures], rows)


def _by_part(found: Statistics, value: Callable[[Sums], float]) -> np.ndarray:
    """[parts, layers], NaN where a layer has no such part."""
    by_part = found.by_part()
    return np.array(
        [
            [value(by_part[layer, part]) if (layer, part) in by_part else np.nan for layer in range(found.layers)]
            for part in _parts(found)
        ],
        dtype=np.float64,
    ).reshape(-1, found.layers)


def _parts(found: Statistics) -> list[str]:
    there = {place.part for place in found.sums}
    return [part for part in PARTS if part in there]


def _part_heatmap(title: str, found: Statistics, z: np.ndarray, note: str, **options: object) -> RenderedChart:
    hover = "layer %{x}, %{y}: %{z:.4g}<extra></extra>"
    heatmap = go.Heatmap(z=z.astype(np.float32), y=_parts(found), hovertemplate=hover, **options)
    layout = {
        "yaxis": {"autorange": "reversed", "dtick": 1, "showgrid": False},
        "xaxis": {"showgrid": False} | ({"dtick": 1} if found.layers <= 10 else {}),
    }
    return RenderedChart(title, PART_AXES, go.Figure(heatmap, layout), note)


def _layer_curves(
    title: str, curves: dict[str, dict[int, float]], labels: list[str], note: str, start_at_zero: bool = False
) -> RenderedChart:
    """A curve for each model; a model has the colour of its place in `labels` in every chart."""
    layout: dict = {"xaxis": {"dtick": 1}} if max(map(len, curves.values())) <= 10 else {}
    figure = go.Figure(layout=layout | ({"yaxis": {"rangemode": "tozero"}} if start_at_zero else {}))
    for label, values in curves.items():
        figure.add_scatter(
            x=list(values), y=list(values.values()), mode="lines+markers", name=escaped(label, 60), meta=label,
            line={"color": COLOURS[labels.index(label) % len(COLOURS)], "width": 2},
            hovertemplate="layer %{x}: %{y:.4g}",
        )  # fmt: skip
    return RenderedChart(title, LAYER_AXES, figure, note)


def _integer_ticks(rows: int, columns: int) -> dict:
    return {axis: {"dtick": 1} for axis, count in (("yaxis", rows), ("xaxis", columns)) if count <= 10}


def _number(value: float | None, digits: int = 4) -> str:
    return ABSENT if value is None or np.isnan(value) else f"{value:.{digits}g}"
