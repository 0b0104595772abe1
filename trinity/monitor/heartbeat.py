"""A run that hangs is ended, so that its launcher can start it again: the report's alarm after three minutes.

Everything that makes progress beats: each microbatch, evaluation and save. A thread watches. When no beat came for too
long, it writes the stacks of all threads of this process, and NCCL's flight record where there is one, notes an event,
and ends the process with code 1. The other ranks wait for this one, so their own watch ends them.
"""

import faulthandler
import os
import threading
import time
from pathlib import Path

import torch

from trinity.monitor.events import Events
from trinity.terminal import say

FIRST_STEP = 10
"""So many times the limit until the first step is done: loading, compiling, first allocations. Ours."""

LAST_LOOK = 3.0
"""Seconds, or the limit where that is less, that a process stays after its alarm: the others, which wait for it, look
within a second and write their stacks; they would end without, by a connection that closes. Ours."""


class Heartbeat:
    """Watches this process from a thread of its own.

    Args:
        seconds: the longest time between two beats; 0 watches nothing.
        events: where the alarm is noted.
        directory: where the stacks are written.
    """

    def __init__(self, seconds: float, events: Events, directory: Path) -> None:
        self._limit, self._events, self._directory = seconds, events, directory
        self._last, self._doing, self._warm = time.monotonic(), "starting", False
        self._closed = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()

    def beat(self, doing: str = "training") -> None:
        """Something was done; what comes next is `doing`."""
        self._last, self._doing = time.monotonic(), doing

    def begin_long(self, doing: str) -> None:
        """What comes next may take as long as the first step: an export, loading a checkpoint."""
        self._warm = False
        self.beat(doing)

    def step_done(self) -> None:
        """A whole step was done: from now on the limit itself holds."""
        self._warm = True
        self.beat()

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()

    def _watch(self) -> None:
        # time.monotonic: a clock that is set back or forward raises no alarm
        while not self._closed.wait(min(1.0, self._limit / 4)):
            limit = self._limit if self._warm else FIRST_STEP * self._limit
            if time.monotonic() - self._last > limit:
                self._alarm(limit)

    def _alarm(self, limit: float) -> None:
        rank = self._events.rank
        stacks = self._directory / f"stacks.rank{rank}.txt"
        message = f"no progress for {limit:g} s while {self._doing}; stacks are in {stacks.name}, the process ends"
        try:
            with open(stacks, "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            _write_flight_record(self._directory / f"nccl.rank{rank}.pickle")
            self._events.note("heartbeat", message, seconds=limit)
        except OSError as error:  # a full disk must not keep a hanging process alive
            say(f"rank {rank}: heartbeat: {message} ({error})")
        finally:
            time.sleep(min(LAST_LOOK, limit))
            os._exit(1)


def _write_flight_record(path: Path) -> None:
    """NCCL's last collectives, where torch records them (TORCH_FR_BUFFER_SIZE or TORCH_NCCL_TRACE_BUFFER_SIZE)."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is not None and torch.cuda.is_available():
        path.write_bytes(dump())
