"""Line charts of metrics.jsonl over tokens.

One run: a colour for each field. Several runs: a colour for each run, a dash for each field. To add a chart, add a
`Chart` to the list of its section: LOSS, OPTIMIZER, SPEED, BATCHES or ROUTING.
"""

from html import escape
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from trinity.reporting import axes
from trinity.reporting.downsample import MAX_POINTS, downsample, smooth
from trinity.reporting.run_log import RunLog
from trinity.reporting.unigram import unigram_entropies

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#7F7F7F"]
"""Okabe and Ito's palette for colour-blind readers, without black and yellow, which are invisible on one of the two
backgrounds."""
DOWNSAMPLED = f"Downsampled to {MAX_POINTS} points a curve."
DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"]
MARKERS_ONLY, MARKERS_ON_LINE = 10, 60
"""Curves with at most this many points are drawn as markers, or as a line with markers. Not from the report."""
MARK_COLOUR = "#CC3311"
EVENT_MARKS = {
    "skipped": ("x", "update skipped"),
    "spike": ("triangle-up", "spike"),
    "rollback": ("triangle-left", "rollback"),
    "collapse": ("diamond", "router warning"),
    "forgetting": ("square", "forgetting budget exceeded"),
    "resume": ("line-ns", "restart"),
}
"""Event kinds that are marked on a curve: symbol and name in the legend."""


class Chart(NamedTuple):
    """The specification of one chart.

    unit: of the vertical axis.
    fields: fields of metrics.jsonl → name in the legend; a field that ends in "." means all with that prefix.
    log: logarithmic vertical axis.
    smoothed: the field that is drawn raw and smoothed; "" for none.
    marks: event kinds marked on the first field.
    unigram: draw the unigram entropy of the run's data.
    signed: values may be negative.
    """

    title: str
    unit: str
    fields: dict[str, str]
    log: bool = False
    smoothed: str = ""
    marks: tuple[str, ...] = ()
    unigram: bool = False
    signed: bool = False


class RenderedChart(NamedTuple):
    """A drawn chart.

    title, axes: text above it; axes describes both axes, since a narrow window has no room for axis titles.
    note: text below it.
    """

    title: str
    axes: str
    figure: go.Figure
    note: str = ""


LOSS = [
    Chart(
        "Loss", "nats per token",
        {"loss": "training", "validation_loss.": "validation ", "validation_loss_average.": "average "},
        smoothed="loss", marks=("resume", "rollback", "spike", "skipped"), unigram=True,
    ),
    Chart("Validation by bytes", "bits per byte", {"validation_bits_per_byte.": ""}),
    Chart("Validation by context", "nats per token, by tokens of context and set", {"validation_loss_at.": ""}),
    Chart(
        "Forgetting", "validation loss minus that of step 0, nats per token", {"forgetting.": ""},
        marks=("forgetting",), signed=True,
    ),
    Chart("Other losses", "nats per token", {"z_loss": "z-loss", "sequence_loss": "sequence loss"}, log=True),
]  # fmt: skip
NEEDLES = [
    Chart(
        "Needles found", "share of the samples, by tokens of a sample",
        {"needle.": "MK-NIAH 1 @", "needle_2.": "MK-NIAH 2 @", "needle_3.": "MK-NIAH 3 @"},
    ),
    Chart(
        "Loss of the needles' answers", "nats of an answer, by tokens of a sample",
        {"needle_nats.": "MK-NIAH 1 @", "needle_2_nats.": "MK-NIAH 2 @", "needle_3_nats.": "MK-NIAH 3 @"},
    ),
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
        "Straggler spread", "slowest − fastest rank in attention, as a share of the median rank's time",
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
    Chart("MaxVio in validation", "worst layer, by validation set", {"validation_max_violation.": ""}),
    Chart("Experts without a token in validation", "share, by validation set", {"validation_dead_experts.": ""}),
    Chart("Starved experts", "experts without a token, all layers", {"starved_experts": "starved"}),
    Chart("Router entropy", "nats", {"router_entropy": "entropy"}),
    Chart("Expert bias", "largest − smallest, worst layer", {"bias_range": "range"}),
]  # fmt: skip


class RenderedSection(NamedTuple):
    """The charts of a section: the drawn ones, and the titles of those without data and of those that are always 0."""

    charts: list[RenderedChart]
    missing: list[str]
    zero: list[str]


def render_charts(charts: list[Chart], runs: list[RunLog]) -> RenderedSection:
    """Draw the charts that have data."""
    section = RenderedSection([], [], [])
    for chart in charts:
        values = [run.metrics[field] for run in runs for field, _ in _fields(chart, run)]
        if not values:
            section.missing.append(chart.title)
        elif not any(np.nan_to_num(y_N).any() for y_N in values):
            section.zero.append(chart.title)
        elif (rendered := render_chart(chart, runs)) is not None:
            section.charts.append(rendered)
        else:  # negative values on a logarithmic axis
            section.missing.append(chart.title)
    return section


def render_chart(chart: Chart, runs: list[RunLog]) -> RenderedChart | None:
    """One chart of all runs; None if no run has values to draw."""
    figure = go.Figure()
    notes: list[str] = []
    curve_numbers: dict[str, int] = {}
    single = len(runs) == 1
    for run_number, run in enumerate(runs):
        prefix = "" if single else f"{run.name} · "
        for field, label in _fields(chart, run):
            curve_number = curve_numbers.setdefault(label, len(curve_numbers))
            colour = COLOURS[(curve_number if single else run_number) % len(COLOURS)]
            line = {"color": colour, "dash": "solid" if single else DASHES[curve_number % len(DASHES)], "width": 2}
            notes += _add_curves(figure, run, field, prefix + label, line, chart)
        if chart.unigram:
            _add_unigram(figure, run, prefix)
        _add_marks(figure, run, chart, prefix, MARK_COLOUR if single else COLOURS[run_number % len(COLOURS)])
    if not figure.data:
        return None
    vertical = {"type": "log"} if chart.log else {"rangemode": "tozero" if chart.signed else "nonnegative"}
    columns = [run.metrics for run in runs]
    number_format = {"exponentformat": "B"} if chart.unit.startswith("tokens") else {}
    figure.update_layout(yaxis=vertical | number_format, **axes.layout(columns))
    return RenderedChart(
        chart.title, f"{chart.unit}, by {axes.x_label(columns)}", figure, " ".join(dict.fromkeys(notes))
    )


def line_mode(points: int) -> str:
    """Plotly's mode for a curve of `points` points."""
    if points <= MARKERS_ONLY:
        return "markers"
    return "lines+markers" if points <= MARKERS_ON_LINE else "lines"


def escaped(text: object, most: int = 200) -> str:
    """Text with tags and entities escaped, which plotly would interpret, and cut to `most` characters."""
    text = str(text)
    return escape(text if len(text) <= most else text[: most - 1] + "…", quote=False)


def _fields(chart: Chart, run: RunLog) -> list[tuple[str, str]]:
    """(field, legend name) of the chart's fields that the run has."""
    present = []
    for field, label in chart.fields.items():
        if field.endswith("."):
            present += [(name, label + name.removeprefix(field)) for name in run.metrics.names(field)]
        elif field in run.metrics:
            present.append((field, label))
    return present


def _add_curves(figure: go.Figure, run: RunLog, field: str, name: str, line: dict, chart: Chart) -> list[str]:
    """Add one field of one run, raw and smoothed if the chart smooths it; returns notes for the reader."""
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
    points = downsample(y_N)
    if not len(points):
        return []
    figure.add_scatter(
        x=axes.x_values(run.metrics)[points], y=y_N[points], customdata=np.array(run.metrics.steps)[points],
        name=escaped(name, 60), meta=name, line=line, mode=line_mode(len(points)),
        hovertemplate="step %{customdata}<br>%{x:,}: %{y:.6g}", **options,
    )  # fmt: skip
    return [DOWNSAMPLED] if len(points) < np.isfinite(y_N).sum() else []


def _add_unigram(figure: go.Figure, run: RunLog, prefix: str) -> None:
    """Add a horizontal line for each data set whose unigram entropy is available."""
    entropies = unigram_entropies(run.config) if run.config else {}
    for number, (name, entropy) in enumerate(entropies.items()):
        label = f"{prefix}unigram entropy, {name}"
        line = {"color": COLOURS[number % len(COLOURS)], "dash": "dot", "width": 1.5}
        figure.add_scatter(
            x=[0, axes.x_values(run.metrics)[-1]], y=[entropy, entropy], mode="lines", line=line,
            name=escaped(label, 60), meta=label, hovertemplate="%{y:.6g}",
        )  # fmt: skip


def _add_marks(figure: go.Figure, run: RunLog, chart: Chart, prefix: str, colour: str) -> None:
    """Add markers for events on the chart's first field, at the curve's last finite value before the event."""
    field = next(iter(chart.fields))
    if not chart.marks or field not in run.metrics:
        return
    y_N = run.metrics[field]
    if chart.smoothed:
        y_N = smooth(y_N)[0]
    y_N = _forward_fill(y_N)
    for kind in chart.marks:
        events = _marked_events(run, kind)
        if not events:
            continue
        symbol, label = EVENT_MARKS[kind]
        indices = [run.index_at(step) for step, _ in events]
        line = {"width": 2, "color": colour}
        figure.add_scatter(
            x=axes.x_values(run.metrics)[indices], y=y_N[indices], mode="markers",
            name=escaped(prefix + label, 60), meta=prefix + label,
            marker={"symbol": symbol, "size": 12, "color": MARK_COLOUR, "line": line},
            text=[escaped(message) for _, message in events], customdata=[step for step, _ in events],
            hovertemplate="step %{customdata}<br>%{text}",
        )  # fmt: skip


def _marked_events(run: RunLog, kind: str) -> list[tuple[int, str]]:
    """(step, message) of each event of a kind; skipped steps are also taken from metrics.jsonl."""
    events = [(event.step, event.message) for event in run.events if event.kind == kind and event.step is not None]
    if kind == "skipped":
        steps = {step for step, _ in events}
        skipped = [run.metrics.steps[index] for index in np.flatnonzero(run.metrics["skipped"] == 1)]
        events += [(step, "the update was skipped") for step in skipped if step not in steps]
    return sorted(events)[-MAX_POINTS:]


def _forward_fill(y_N: np.ndarray) -> np.ndarray:
    """Replace NaN by the last finite value before it, or by the first finite value."""
    finite = np.flatnonzero(np.isfinite(y_N))
    if not len(finite):
        return y_N
    return y_N[finite[np.maximum(np.searchsorted(finite, np.arange(len(y_N)), side="right") - 1, 0)]]
