"""Line charts over tokens: which fields of metrics.jsonl stand in which chart, and how they are drawn.

One run: a colour a field. Several: a colour a run, a dash a field. To add a chart, add a line to SECTIONS.
"""

from html import escape
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from trinity.reporting import axes
from trinity.reporting.downsample import MOST_POINTS, smooth, thin
from trinity.reporting.run_log import RunLog
from trinity.reporting.unigram import unigram_entropies

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#7F7F7F"]
"""Okabe and Ito's, for colour-blind people; not their black and yellow, which one of the two backgrounds swallows."""
THINNED = f"Thinned to {MOST_POINTS} points a curve."
DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"]
FEW, SOME = 10, 60
"""Points that are drawn without a line between them, and with markers on a line. Not from the report."""
MARK_COLOUR = "#CC3311"
MARKS = {
    "skipped": ("x", "update skipped"),
    "spike": ("triangle-up", "spike"),
    "rollback": ("triangle-left", "rollback"),
    "collapse": ("diamond", "router warning"),
    "resume": ("line-ns", "restart"),
}
"""Event kinds that are marked on a curve: symbol and words."""


class Chart(NamedTuple):
    """One chart.

    title: above it.
    unit: of its height.
    fields: of metrics.jsonl, with their words in the legend; a field that ends in "." stands for all that begin so.
    smoothed: the field that is drawn raw and smoothed, "" for none.
    marks: event kinds marked on the first field.
    unigram: draw the unigram entropy of what the run reads.
    """

    title: str
    unit: str
    fields: dict[str, str]
    log: bool = False
    smoothed: str = ""
    marks: tuple[str, ...] = ()
    unigram: bool = False


class Picture(NamedTuple):
    """A chart that is drawn.

    title, axes: above it: what it is, and what stands by what; a narrow window has no room for titles of axes.
    note: below it.
    """

    title: str
    axes: str
    figure: go.Figure
    note: str = ""


LOSS = [
    Chart(
        "Loss", "nats per token", {"loss": "training", "validation_loss.": "validation "}, smoothed="loss",
        marks=("resume", "rollback", "spike", "skipped"), unigram=True,
    ),
    Chart("Validation by bytes", "bits per byte", {"validation_bits_per_byte.": ""}),
    Chart("Other losses", "nats per token", {"z_loss": "z-loss", "sequence_loss": "sequence loss"}, log=True),
]  # fmt: skip
OPTIMIZER = [
    Chart("Learning rates", "rate", {"lr_muon": "Muon", "lr_adamw": "AdamW"}, marks=("resume", "rollback")),
    Chart("Gradient norm before clipping", "norm", {"grad_norm": "norm"}, log=True, marks=("skipped", "spike")),
    Chart("Weight norms", "norm", {"weight_norm.": ""}, log=True),
    Chart("Update norms", "norm", {"update_norm.": ""}, log=True),
    Chart("Largest logits", "logit", {"max_head_logit": "head", "max_attention_logit": "attention"}),
]
SPEED = [
    Chart("Throughput", "tokens/s", {"tokens_per_second": "tokens/s"}, smoothed="tokens_per_second"),
    Chart("MFU", "share of peak", {"mfu": "MFU"}, smoothed="mfu"),
    Chart("Goodput", "share of wall time in steps", {"goodput": "goodput"}),
    Chart(
        "Waiting", "seconds in a step",
        {"data_seconds": "for data", "checkpoint_seconds": "for a checkpoint"},
    ),
    Chart(
        "Slowest and fastest rank apart", "in attention, as a share of the median rank's time",
        {"rank_seconds_spread": "spread"},
    ),
    Chart("Memory", "GiB", {"memory_gib": "peak"}),
]  # fmt: skip
BATCHES = [
    Chart("BatchHet", "largest − mean loss of a group, nats", {"batch_het": "BatchHet"}, smoothed="batch_het"),
    Chart("Tokens by source", "tokens", {"source_tokens.": ""}),
    Chart("Epochs by source", "epochs", {"epoch.": ""}),
]
ROUTING = [
    Chart(
        "MaxVio", "largest load over the mean, − 1",
        {"max_violation": "worst layer", "max_violation_mean": "mean of the layers"}, marks=("collapse",),
    ),
    Chart("Experts without a token", "share", {"dead_experts": "dead experts"}),
    Chart("Starved experts", "experts without a token, all layers", {"starved_experts": "starved"}),
    Chart("Router entropy", "nats", {"router_entropy": "entropy"}),
    Chart("Expert bias", "largest − smallest, worst layer", {"bias_range": "range"}),
]  # fmt: skip


class Drawn(NamedTuple):
    """The charts of a section: those that are drawn, and the titles of those without data or with zeros alone."""

    pictures: list[Picture]
    missing: list[str]
    zero: list[str]


def pictures(charts: list[Chart], runs: list[RunLog]) -> Drawn:
    """Draw what there is data for."""
    drawn = Drawn([], [], [])
    for chart in charts:
        values = [run.metrics[field] for run in runs for field, _ in _fields(chart, run)]
        if not values:
            drawn.missing.append(chart.title)
        elif not any(np.nan_to_num(y_N).any() for y_N in values):
            drawn.zero.append(chart.title)
        elif (picture := draw(chart, runs)) is not None:
            drawn.pictures.append(picture)
        else:  # negative values on a logarithmic axis
            drawn.missing.append(chart.title)
    return drawn


def draw(chart: Chart, runs: list[RunLog]) -> Picture | None:
    """One chart of all runs; None where none has its fields."""
    figure, notes = go.Figure(), []
    places: dict[str, int] = {}
    alone = len(runs) == 1
    for number, run in enumerate(runs):
        prefix = "" if alone else f"{run.name} · "
        for field, words in _fields(chart, run):
            place = places.setdefault(words, len(places))
            colour = COLOURS[(place if alone else number) % len(COLOURS)]
            line = {"color": colour, "dash": "solid" if alone else DASHES[place % len(DASHES)], "width": 2}
            notes += _add_curves(figure, run, field, prefix + words, line, chart)
        if chart.unigram:
            _add_unigram(figure, run, prefix)
        _add_marks(figure, run, chart, prefix, MARK_COLOUR if alone else COLOURS[number % len(COLOURS)])
    if not figure.data:
        return None
    vertical = {"type": "log"} if chart.log else {"rangemode": "nonnegative"}
    columns = [run.metrics for run in runs]
    counted = {"exponentformat": "B"} if chart.unit.startswith("tokens") else {}
    figure.update_layout(yaxis=vertical | counted, **axes.layout(columns))
    return Picture(chart.title, f"{chart.unit}, by {axes.words(columns)}", figure, " ".join(dict.fromkeys(notes)))


def mode(points: int) -> str:
    """How plotly draws a curve of so few or many points."""
    if points <= FEW:
        return "markers"
    return "lines+markers" if points <= SOME else "lines"


def plain(text: object, most: int = 200) -> str:
    """Text for a figure, where plotly would take tags and entities for markup; cut where it is long."""
    text = str(text)
    return escape(text if len(text) <= most else text[: most - 1] + "…", quote=False)


def _fields(chart: Chart, run: RunLog) -> list[tuple[str, str]]:
    """(field, words) of what the run has."""
    found = []
    for field, words in chart.fields.items():
        if field.endswith("."):
            found += [(name, words + name.removeprefix(field)) for name in run.metrics.names(field)]
        elif field in run.metrics:
            found.append((field, words))
    return found


def _add_curves(figure: go.Figure, run: RunLog, field: str, name: str, line: dict, chart: Chart) -> list[str]:
    """One field of one run, raw and smoothed where the chart says so; returns what the reader must know."""
    y_N = run.metrics[field]
    if chart.log:
        y_N = np.where(y_N > 0, y_N, np.nan)
    smoothed_N, span = smooth(y_N)
    if field != chart.smoothed or span <= 1:
        return _add_line(figure, run, y_N, name, line)
    notes = _add_line(figure, run, y_N, f"{name}, each step", line | {"width": 1}, opacity=0.35)
    _add_line(figure, run, smoothed_N, name, line)
    return [*notes, f"Smoothed: {name}, over up to {span:.0f} steps."]


def _add_line(figure: go.Figure, run: RunLog, y_N: np.ndarray, name: str, line: dict, **options: object) -> list[str]:
    drawn = thin(y_N)
    if not len(drawn):
        return []
    figure.add_scatter(
        x=axes.positions(run.metrics)[drawn], y=y_N[drawn], customdata=np.array(run.metrics.steps)[drawn],
        name=plain(name, 60), meta=name, line=line, mode=mode(len(drawn)),
        hovertemplate="step %{customdata}<br>%{x:,}: %{y:.6g}", **options,
    )  # fmt: skip
    return [THINNED] if len(drawn) < np.isfinite(y_N).sum() else []


def _add_unigram(figure: go.Figure, run: RunLog, prefix: str) -> None:
    """A level line for each set whose tokens can be counted."""
    entropies = unigram_entropies(run.config) if run.config else {}
    for number, (name, entropy) in enumerate(entropies.items()):
        words = f"{prefix}unigram entropy, {name}"
        line = {"color": COLOURS[number % len(COLOURS)], "dash": "dot", "width": 1.5}
        figure.add_scatter(
            x=[0, axes.positions(run.metrics)[-1]], y=[entropy, entropy], mode="lines", line=line,
            name=plain(words, 60), meta=words, hovertemplate="%{y:.6g}",
        )  # fmt: skip


def _add_marks(figure: go.Figure, run: RunLog, chart: Chart, prefix: str, colour: str) -> None:
    """Events on the chart's first field: at the curve's last finite height before them."""
    field = next(iter(chart.fields))
    if not chart.marks or field not in run.metrics:
        return
    y_N = run.metrics[field]
    if chart.smoothed:
        y_N = smooth(y_N)[0]
    y_N = _filled(y_N)
    for kind in chart.marks:
        found = _marked(run, kind)
        if not found:
            continue
        symbol, words = MARKS[kind]
        at = [run.nearest(step) for step, _ in found]
        line = {"width": 2, "color": colour}
        figure.add_scatter(
            x=axes.positions(run.metrics)[at], y=y_N[at], mode="markers",
            name=plain(prefix + words, 60), meta=prefix + words,
            marker={"symbol": symbol, "size": 12, "color": MARK_COLOUR, "line": line},
            text=[plain(message) for _, message in found], customdata=[step for step, _ in found],
            hovertemplate="step %{customdata}<br>%{text}",
        )  # fmt: skip


def _marked(run: RunLog, kind: str) -> list[tuple[int, str]]:
    """(step, message) of each event of a kind; skipped steps are known to metrics.jsonl too."""
    found = [(event.step, event.message) for event in run.events if event.kind == kind and event.step is not None]
    if kind == "skipped":
        told = {step for step, _ in found}
        skipped = [run.metrics.steps[index] for index in np.flatnonzero(run.metrics["skipped"] == 1)]
        found += [(step, "the update was skipped") for step in skipped if step not in told]
    return sorted(found)[-MOST_POINTS:]


def _filled(y_N: np.ndarray) -> np.ndarray:
    """NaN replaced by the last finite value before it, or by the first one."""
    finite = np.flatnonzero(np.isfinite(y_N))
    if not len(finite):
        return y_N
    return y_N[finite[np.maximum(np.searchsorted(finite, np.arange(len(y_N)), side="right") - 1, 0)]]
