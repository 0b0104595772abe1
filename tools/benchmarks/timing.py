"""Timing for the suites: contenders take turns, the parts of a call are timed apart, and a failure is a row.

Two variables of the environment, both optional: BENCH_SECONDS, the time after which a suite starts no measurement, and
BENCH_RECORD, a file to which every case is appended as a line of JSON as soon as it is measured.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch

from trinity.io.json_files import to_json

DENSE_TF, COPY_TBS = 789, 4.3
"""Upper bounds measured on an H200 through torch: bf16 products of random data in TFLOP/s, a copy in TB/s."""

MAX_SLOWDOWN = 20
"""A contender slower than the fastest by more than this factor is called only once."""

Marks = Callable[[], None]
"""Called between two parts of a timed call."""

_start = time.monotonic()


def start_clock() -> None:
    """Count BENCH_SECONDS from now on, not from the import of this module."""
    global _start
    _start = time.monotonic()


def time_left() -> float:
    """Seconds left of the environment's BENCH_SECONDS; infinite if it is not set."""
    return float(os.environ.get("BENCH_SECONDS", "inf")) - (time.monotonic() - _start)


def out_of_time() -> bool:
    """Whether BENCH_SECONDS are over: a suite then starts no further measurement."""
    return time_left() <= 0


def record(case: str, figures: dict[str, Any]) -> None:
    """Append a case to the file in BENCH_RECORD, in one write; without that variable, do nothing.

    The line is {"part": BENCH_PART or null, "case": case, …figures}. A later line of this part and case replaces it.
    """
    path = os.environ.get("BENCH_RECORD")
    if not path:
        return
    line = to_json({"part": os.environ.get("BENCH_PART"), "case": case} | figures, default=str) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def device() -> torch.device:
    """The GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def take_turns(
    contenders: dict[str, Callable[[Marks], None]],
    rounds: int,
    report: Callable[[str, dict[str, Any]], None] = lambda name, figures: None,
) -> dict[str, dict[str, Any]]:
    """Median seconds of the parts of each contender's call, calling each in turn, after a round of warm-up.

    Args:
        contenders: name → a function that calls mark() at the end of each part but the last.
        rounds: number of rounds measured.
        report: called with a contender's name and figures as they are after the warm-up and after each round.
    Returns:
        name → {"seconds": one figure for each part}, or {"failed": reason in one line}. A contender that failed or is
        too slow (MAX_SLOWDOWN) is not called again, and none is called when the time is over.
    """
    samples: dict[str, list[list[float]]] = {name: [] for name in contenders}
    failed: dict[str, str] = {}
    for _ in range(rounds + 1):
        fastest = min((sum(found[-1]) for found in samples.values() if found), default=0.0)
        for name, call in contenders.items():
            too_slow = samples[name] and sum(samples[name][-1]) > MAX_SLOWDOWN * fastest
            if name in failed or too_slow or (out_of_time() and len(samples[name]) > 1):
                continue
            if out_of_time():
                failed[name] = "not measured: the suite's time was up"
            else:
                try:
                    samples[name].append(parts_of(call))
                except Exception as error:  # any error of a contender is its result
                    failed[name] = one_line(error)
            report(name, _figures(samples[name], failed.get(name)))
    return {name: _figures(samples[name], failed.get(name)) for name in contenders}


def _figures(samples: list[list[float]], failed: str | None) -> dict[str, Any]:
    """A contender's result so far; the first sample warms up and counts only if there is no other."""
    return {"seconds": medians(samples[1:] or samples)} if failed is None else {"failed": failed}


def medians(samples: Iterable[list[float]]) -> list[float]:
    """Median of each column."""
    return [statistics.median(values) for values in zip(*samples)]


def one_line(error: BaseException) -> str:
    """An error's message in one line, short enough for a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split()).replace("|", "/")
    if not isinstance(error, ValueError | ImportError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 160 else f"{text[:159]}…"


def parts_of(call: Callable[[Marks], None]) -> list[float]:
    """Seconds of the parts of one call; on a GPU by CUDA events, after flushing the L2 cache."""
    if not torch.cuda.is_available():
        times = [time.perf_counter()]
        call(lambda: times.append(time.perf_counter()))
        times.append(time.perf_counter())
        return [after - before for before, after in pairwise(times)]
    _flush()
    events = [_event()]
    call(lambda: events.append(_event()))
    events.append(_event())
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1000 for before, after in pairwise(events)]


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _flush() -> None:
    """Write 256 MiB, four times the L2 cache of an H200, and wait."""
    global _FLUSH_BUFFER
    if _FLUSH_BUFFER is None:
        _FLUSH_BUFFER = torch.empty(2**28, dtype=torch.int8, device="cuda")
    _FLUSH_BUFFER.zero_()
    torch.cuda.synchronize()


_FLUSH_BUFFER: torch.Tensor | None = None
