"""The tables of a report as HTML: summary, events, samples, settings and their differences. Text is escaped."""

import json
import math
from collections import Counter
from datetime import datetime
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np

from trinity.reporting.downsample import evenly_spaced
from trinity.reporting.run_log import Event, RunLog, last_finite
from trinity.terminal import format_duration

MAX_EVENTS = 300
"""Rows of the table of events. Not from the report."""
SAMPLED_STEPS = 6
"""Steps in the table of samples, evenly spaced, with the last. Not from the report."""
ROUTINE = ("checkpoint", "evaluation", "profile")
"""Event kinds that are counted but not listed."""
ABSENT = "–"

Rows = list[list[str]]


def summary(runs: list[RunLog]) -> str:
    """A row for each summary value, a column for each run."""
    columns = [_summary_of(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(column.get(name, ABSENT) for column in columns)] for name in names]
    return table(["", *(run.name for run in runs)], rows)


def events(runs: list[RunLog]) -> str:
    """Counts of all event kinds and a table of the events that are not routine; "" if no run has events."""
    events_by_run: list[tuple[str, Event]] = [(run.name, event) for run in runs for event in run.events]
    if not events_by_run:
        return ""
    counts = Counter(event.kind for _, event in events_by_run)
    listed = [(name, event) for name, event in events_by_run if event.kind not in ROUTINE]
    shown = listed[-MAX_EVENTS:]
    totals = ", ".join(f"{times} × {kind}" for kind, times in counts.items())
    routine = f" Not in the table: {', '.join(kind for kind in ROUTINE if kind in counts)}."
    left_out = f" Only the last {MAX_EVENTS} of {len(listed)} are shown." if len(shown) < len(listed) else ""
    note = f"{totals}.{routine if set(ROUTINE) & set(counts) else ''}{left_out}"
    head = ["time (UTC)", "step", "kind", "rank", "message", "details"]
    body = [
        [
            _clock(event.time),
            "" if event.step is None else f"{event.step:,}",
            event.kind,
            event.rank,
            event.message,
            event.details,
        ]
        for _, event in shown
    ]
    if len(runs) > 1:
        head, body = ["run", *head], [[name, *cells] for (name, _), cells in zip(shown, body)]
    return f"<div id=events><p>{escape(note)}</p>{table(head, body) if body else ''}</div>"


def samples(runs: list[RunLog]) -> str:
    """Each run's continuations of the prompts at some of its steps, the newest first."""
    head, body, notes = ["step", "prompt", "continuation"], [], []
    for run in runs:
        steps = sorted({sample.step for sample in run.samples}, reverse=True)
        shown = [steps[index] for index in evenly_spaced(len(steps), SAMPLED_STEPS)] if steps else []
        if len(shown) < len(steps):
            notes.append(f"{len(shown)} of {len(steps)} steps; all are in {run.path / 'samples.jsonl'}.")
        for step in shown:
            of_step = [sample for sample in run.samples if sample.step == step]
            body += [[f"{step:,}", sample.prompt, sample.text, run.name] for sample in of_step]
    if len(runs) == 1:
        rows = [row[:3] for row in body]
    else:
        head, rows = ["run", *head], [[row[3], *row[:3]] for row in body]
    note = "".join(f"<p class=note>{escape(note)}</p>" for note in notes)
    return f"<div id=sampled>{note}{table(head, rows)}</div>"


def settings(runs: list[RunLog]) -> str:
    """Settings that differ between runs and between a run's starts, and each run's settings; "" if no run has any."""
    with_settings = [run for run in runs if run.configs]
    if not with_settings:
        return ""
    parts = []
    if len(with_settings) > 1:
        flat = {run.name: flatten(run.configs[-1][1]) for run in with_settings}
        parts.append(_difference_table("Settings that differ between the runs", flat))
    for run in with_settings:
        for (before, old), (after, new) in pairwise(run.configs):
            both = {before: flatten(old), after: flatten(new)}
            parts.append(_difference_table(f"{run.name}: changed at a restart", both))
    return "".join([*parts, *map(_collapsed_settings, with_settings)])


def differences(flat: dict[str, dict[str, Any]]) -> Rows:
    """[key, value of each run] of the settings that are not equal in all, except the run's name and directory."""
    keys = dict.fromkeys(key for values in flat.values() for key in values if key not in ("run.name", "run.dir"))
    rows = [[key, *(str(values.get(key, ABSENT)) for values in flat.values())] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def flatten(settings: dict, prefix: str = "") -> dict[str, Any]:
    """Dotted key → value; a list is one value."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def table(head: list[str], rows: Rows) -> str:
    """An HTML table that scrolls sideways in a narrow window; the first cell of a row is its header."""
    cells = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th scope=row>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    return f"<div class=wide><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"


def _clock(time: str) -> str:
    """An event's UTC time without fractions: 2026-01-01T12:00:00.000+00:00 → 2026-01-01 12:00:00."""
    return time[:19].replace("T", " ")


def _collapsed_settings(run: RunLog) -> str:
    title = f"{run.name}: {run.configs[-1][0]}"
    return f"<details><summary>{escape(title)}</summary><pre>{escape(run.config_text)}</pre></details>"


def _difference_table(title: str, flat: dict[str, dict[str, Any]]) -> str:
    rows = differences(flat)
    if not rows:
        return f"<h3>{escape(title)}</h3><p>None.</p>"
    return f"<h3>{escape(title)}</h3>{table(['setting', *flat], rows)}"


def goodput(run: RunLog) -> float:
    """Share of the wall time, from the first start to the last event, spent in steps that count.

    A repeated step counts once, a skipped step not at all; time between two starts is lost. NaN without event times.
    """
    seconds = wall_seconds(run)
    if math.isnan(seconds):
        return math.nan
    timed = np.array(run.metrics.steps) <= (run.events[-1].step or 0)  # later steps are outside the wall time
    useful = np.nansum(run.metrics["step_seconds"][timed & (run.metrics["skipped"] != 1)])
    return float(useful) / seconds if seconds > 0 else math.nan


def wall_seconds(run: RunLog) -> float:
    """Seconds from the first start to the last event, including time between starts; NaN without event times."""
    try:
        times = [datetime.fromisoformat(event.time) for event in run.events]
        return (times[-1] - times[0]).total_seconds()
    except (ValueError, TypeError, IndexError):
        return math.nan


def device(run: RunLog) -> str:
    """Processes and device of the newest start, such as "8 × NVIDIA H200"."""
    for event in reversed(run.events):
        details = json.loads(event.details) if event.kind in ("start", "resume") and event.details else {}
        if "device" in details:
            return f"{details.get('processes', 1)} × {details['device']}"
    return ABSENT


def _summary_of(run: RunLog) -> dict[str, str]:
    metrics = run.metrics
    values = {
        "state": _state(run),
        "steps": f"{metrics.steps[-1]:,}",
        "tokens": _count(last_finite(metrics["tokens"])),
        "parameters": _parameters(run),
        "loss, last step": _number(last_finite(metrics["loss"])),
        "loss, lowest step": _lowest(run, "loss"),
    }
    for name in metrics.names("validation_loss."):
        values[f"validation {name.partition('.')[2]}, last"] = _number(last_finite(metrics[name]))
        values[f"validation {name.partition('.')[2]}, lowest"] = _lowest(run, name)
    for name in metrics.names("validation_loss_average."):
        values[f"average {name.partition('.')[2]}, last"] = _number(last_finite(metrics[name]))
    for name in metrics.names("validation_bits_per_byte."):
        values[f"bits per byte {name.partition('.')[2]}, last"] = _number(last_finite(metrics[name]))
    for name in metrics.names("validation_max_violation."):
        values[f"MaxVio {name.partition('.')[2]}, last"] = _number(last_finite(metrics[name]))
    for name in metrics.names("validation_dead_experts."):
        values[f"dead experts {name.partition('.')[2]}, last"] = _percent(last_finite(metrics[name]))
    budgets = run.config.health.forgetting if run.config else {}
    for name in metrics.names("forgetting."):
        rise, budget = last_finite(metrics[name]), budgets.get(name.partition(".")[2])
        values[f"forgetting {name.partition('.')[2]}, last"] = _number(rise) + (f" of {budget:g}" if budget else "")
    seconds = wall_seconds(run)
    return values | {
        "wall time": ABSENT if math.isnan(seconds) else format_duration(seconds),
        "device": device(run),
        "tokens/s, median": _count(_median(metrics["tokens_per_second"])),
        "MFU, median": _percent(_median(metrics["mfu"])),
        "goodput, all starts": _percent(goodput(run)),
        "goodput, last start": _percent(last_finite(metrics["goodput"])),
        "memory, highest (GiB)": _number(_highest(metrics["memory_gib"])),
        "MaxVio, last": _number(last_finite(metrics["max_violation"])),
        "restarts": str(restarts(run)),
        "skipped steps": f"{int(np.nansum(metrics['skipped']))}" if "skipped" in metrics else ABSENT,
        "rollbacks": _count(last_finite(metrics["attempt"])),
    }


def restarts(run: RunLog) -> int:
    """Starts after the first, counted by "resume" events and by numbered configs; the larger count."""
    numbers = [int(name.split(".")[1]) for name, _ in run.configs if name != "config.yaml"]
    return max(sum(event.kind == "resume" for event in run.events), max(numbers, default=0))


def _state(run: RunLog) -> str:
    state, reason = str(run.status.get("state", "unknown")), str(run.status.get("reason") or "")
    return f"{state}: {reason}" if reason else state


def _parameters(run: RunLog) -> str:
    """Total and active parameters of the newest config's model; ABSENT if the config cannot be loaded."""
    if run.config is None:
        return ABSENT
    from trinity.models.flops import parameter_counts

    counts = parameter_counts(run.config.model)
    return f"{_count(counts['total'])} ({_count(counts['active'])} active)"


def _lowest(run: RunLog, name: str) -> str:
    values = run.metrics[name]
    if not np.isfinite(values).any():
        return ABSENT
    at = int(np.nanargmin(values))
    return f"{_number(values[at])} (step {run.metrics.steps[at]:,})"


def _median(values: np.ndarray) -> float:
    return float(np.nanmedian(values)) if np.isfinite(values).any() else math.nan


def _highest(values: np.ndarray) -> float:
    return float(np.nanmax(values)) if np.isfinite(values).any() else math.nan


def _number(value: float) -> str:
    return ABSENT if math.isnan(value) else f"{value:.4g}"


def _percent(value: float) -> str:
    return ABSENT if math.isnan(value) else f"{value:.1%}"


def _count(value: float) -> str:
    """1234567 → 1.23 M."""
    if math.isnan(value):
        return ABSENT
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.4g}"
