"""torch.profiler over one microbatch of the training step: kernels by time, and the gaps in which the GPU waits.

Recorded with GPU activity alone, which slows the host least; then once more with the host's, for a trace that a person
can open (the file trace.json.gz among the results). Each is the microbatch after three that warm up.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks import nano_step
from benchmarks.timing import parts_of, record
from torch.profiler import ProfilerActivity, profile

ROWS = 40
"""Kernels listed one by one; the rest are one row."""

GAPS = 20
"""Gaps listed one by one."""

SHORT_US = 5
"""A gap below this is a launch's own latency."""

LARGEST_TRACE = 8 * 2**20
"""Bytes of a trace that is kept."""


class Interval(NamedTuple):
    """One kernel or operation; times in µs."""

    name: str
    begin: float
    end: float


def run() -> None:
    """Record the kernels and the gaps of a microbatch, then write a trace."""
    if torch.cuda.is_available():
        title, words = nano_step.layers_that_fit()
        setup = nano_step.prepare(nano_step.CONFIG, "balanced", words)
        activity = ProfilerActivity.CUDA
    else:
        title, setup, activity = "smoke", nano_step.prepare("configs/smoke.yaml", "balanced", []), ProfilerActivity.CPU
    rounds = 3 if torch.cuda.is_available() else 1
    seconds = [parts_of(lambda mark: setup.gradient())[0] for _ in range(rounds)][-1]
    record("microbatch, not profiled", {"model": title, "tokens": setup.tokens, "seconds": seconds})
    found = _intervals(_profiled(setup, [activity]), activity)
    for name, row in by_time(found).items():
        record(f"kernel: {name}", row)
    record("gaps", gaps(found))
    if activity == ProfilerActivity.CUDA:
        _write_trace(_profiled(setup, [ProfilerActivity.CPU, activity]))
    from trinity.parallel import mesh

    mesh.stop()


def by_time(found: Iterable[Interval], rows: int = ROWS) -> dict[str, dict[str, Any]]:
    """name → µs in all, calls, share of the sum; the longest first, those after `rows` in one row "the rest"."""
    sums: dict[str, list[float]] = {}
    for name, begin, end in found:
        sums.setdefault(name, []).append(end - begin)
    total = sum(map(sum, sums.values())) or 1.0
    order = sorted(sums, key=lambda name: -sum(sums[name]))
    table = {name: {"us": sum(sums[name]), "calls": len(sums[name])} for name in order[:rows]}
    rest = [us for name in order[rows:] for us in sums[name]]
    if rest:
        table["the rest"] = {"us": sum(rest), "calls": len(rest)}
    return {name: row | {"share": row["us"] / total} for name, row in table.items()}


def gaps(found: Iterable[Interval], rows: int = GAPS) -> dict[str, Any]:
    """From the first kernel's begin to the last one's end: µs with and without any kernel, and the longest gaps.

    Returns:
        {"span_us", "busy_us", "idle_us", "idle_share", "gaps": those of at least SHORT_US, "longest": [{"us", "after",
        "before"}]}; after and before are the names of the kernels on both sides.
    """
    ordered = sorted(found, key=lambda interval: (interval.begin, interval.end))
    holes: list[dict[str, Any]] = []
    latest = ordered[0] if ordered else Interval("", 0.0, 0.0)
    for interval in ordered[1:]:
        if interval.begin > latest.end:
            holes.append({"us": interval.begin - latest.end, "after": latest.name, "before": interval.name})
        if interval.end > latest.end:
            latest = interval
    span, idle = latest.end - (ordered[0].begin if ordered else 0.0), sum(hole["us"] for hole in holes)
    longest = sorted(holes, key=lambda hole: -hole["us"])
    return {
        "span_us": span, "busy_us": span - idle, "idle_us": idle, "idle_share": idle / span if span else 0.0,
        "gaps": sum(hole["us"] >= SHORT_US for hole in holes), "longest": longest[:rows],
    }  # fmt: skip


def _profiled(setup: nano_step.Setup, activities: list[ProfilerActivity]) -> profile:
    with profile(activities=activities) as recorded:
        setup.gradient()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return recorded


def _intervals(recorded: profile, activity: ProfilerActivity) -> list[Interval]:
    """The kernels of a GPU, or on a CPU the innermost operations."""
    wanted = torch.autograd.DeviceType.CUDA if activity == ProfilerActivity.CUDA else torch.autograd.DeviceType.CPU
    return [
        Interval(event.name, event.time_range.start, event.time_range.end)
        for event in recorded.events() or []
        if event.device_type == wanted and not event.cpu_children and not getattr(event, "is_user_annotation", False)
    ]


def _write_trace(recorded: profile) -> None:
    path = Path(os.environ["CHECK_LOGS"]) / "trace.json.gz"
    recorded.export_chrome_trace(str(path))
    size = path.stat().st_size
    if size > LARGEST_TRACE:
        path.unlink()
    record("trace", {"bytes": size, "kept": size <= LARGEST_TRACE})
