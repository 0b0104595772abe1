"""How the suites measure: parts of a call timed apart, contenders in turns, and a failure is a row and not the end."""

import os
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch

DENSE_TF, COPY_TBS = 789, 4.3
"""Ceilings measured on an H200 through torch: bf16 products on random data in TFLOP/s, a copy in TB/s."""

PATIENCE = 20
"""A contender that takes so many times the fastest's time has shown it after one call. Ours."""

Marks = Callable[[], None]
"""Called between two parts of what is timed."""

_BEGAN = time.monotonic()


def time_left() -> float:
    """Of the BENCH_SECONDS that this process has; without end where they are not set."""
    return float(os.environ.get("BENCH_SECONDS", "inf")) - (time.monotonic() - _BEGAN)


def out_of_time() -> bool:
    """Whether a suite should begin nothing more."""
    return time_left() <= 0


def device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def take_turns(contenders: dict[str, Callable[[Marks], None]], rounds: int) -> dict[str, dict[str, Any]]:
    """Median seconds of each contender's parts, one call of each in turn, after a first round that warms up.

    Args:
        contenders: name → a call that says mark() where a part ends; the end of the call ends the last one.
    Returns:
        name → {"seconds": one for each part}, or {"failed": why, in one line}. A contender that failed, or is far
        behind, is not called again, and none is called once the time is up.
    """
    samples: dict[str, list[list[float]]] = {name: [] for name in contenders}
    failed: dict[str, str] = {}
    for _ in range(rounds + 1):
        fastest = min((sum(found[-1]) for found in samples.values() if found), default=0.0)
        for name, call in contenders.items():
            behind = samples[name] and sum(samples[name][-1]) > PATIENCE * fastest
            if name in failed or behind or (out_of_time() and len(samples[name]) > 1):
                continue
            if out_of_time():
                failed[name] = "not measured: the suite's time was up"
                continue
            try:
                samples[name].append(parts_of(call))
            except Exception as error:  # whatever a peer raises is its result here
                failed[name] = one_line(error)
    return {
        name: {"failed": failed[name]} if name in failed else {"seconds": medians(samples[name][1:] or samples[name])}
        for name in contenders
    }


def medians(samples: Iterable[list[float]]) -> list[float]:
    """Of each place."""
    return [statistics.median(values) for values in zip(*samples)]


def one_line(error: BaseException) -> str:
    """Short enough for a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split()).replace("|", "/")
    if not isinstance(error, ValueError | ImportError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 160 else f"{text[:159]}…"


def parts_of(call: Callable[[Marks], None]) -> list[float]:
    """Seconds of one call's parts; on a GPU by its own clock, with an L2 cache that holds nothing of use."""
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
    """Write 256 MiB, four times an H200's L2, and wait."""
    global _PAGES
    if _PAGES is None:
        _PAGES = torch.empty(2**28, dtype=torch.int8, device="cuda")
    _PAGES.zero_()
    torch.cuda.synchronize()


_PAGES: torch.Tensor | None = None
