"""End a hanging process, so that its launcher can restart the run: the report's alarm after three minutes.

Each microbatch, evaluation and save beats the heartbeat. A background thread checks it. When no beat came within the
timeout, the thread writes the stacks of all threads of this process, and NCCL's flight record if there is one, appends
an event, and ends the process with code 1. The other ranks wait for this one, so their own heartbeats end them.
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
"""Multiplier on the timeout until the first step finishes (loading, compiling, allocating). Not from the report."""

GRACE_SECONDS = 3.0
"""Time that a process stays alive after its alarm, at most the timeout. The other ranks, which wait for it, check their
heartbeats within a second and write their stacks. Without it, its closing connection would end them before they could.
Not from the report."""


class Heartbeat:
    """Ends this process if nothing beats for too long; checked by a thread of its own.

    Args:
        seconds: timeout: the longest time allowed between two beats; 0 turns the heartbeat off.
        events: receives the alarm.
        directory: receives the stacks.
    """

    def __init__(self, seconds: float, events: Events, directory: Path) -> None:
        self._timeout, self._events, self._directory = seconds, events, directory
        self._last_beat, self._activity, self._warm = time.monotonic(), "starting", False
        self._closed = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()

    def beat(self, activity: str = "training") -> None:
        """Report progress; `activity` comes next."""
        self._last_beat, self._activity = time.monotonic(), activity

    def begin_long(self, activity: str) -> None:
        """Report progress; `activity` may take as long as the first step: an export, loading a checkpoint."""
        self._warm = False
        self.beat(activity)

    def step_done(self) -> None:
        """Report a whole step: from now on the timeout holds without its multiplier."""
        self._warm = True
        self.beat()

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()

    def _watch(self) -> None:
        # time.monotonic: setting the system clock raises no alarm
        while not self._closed.wait(min(1.0, self._timeout / 4)):
            timeout = self._timeout if self._warm else FIRST_STEP * self._timeout
            if time.monotonic() - self._last_beat > timeout:
                self._alarm(timeout)

    def _alarm(self, timeout: float) -> None:
        rank = self._events.rank
        stacks = self._directory / f"stacks.rank{rank}.txt"
        message = (
            f"no progress for {timeout:g} s while {self._activity}; stacks are in {stacks}, the process ends; the same "
            "command resumes; if the machine is only busy, raise health.heartbeat_seconds"
        )
        try:
            with open(stacks, "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            _write_flight_record(self._directory / f"nccl.rank{rank}.pickle")
            self._events.note("heartbeat", message, seconds=timeout)
        except OSError as error:  # a full disk must not keep a hanging process alive
            say(f"rank {rank}: heartbeat: {message} ({error})")
        finally:
            time.sleep(min(GRACE_SECONDS, timeout))
            os._exit(1)


def _write_flight_record(path: Path) -> None:
    """Write NCCL's last collectives, if torch records them (TORCH_FR_BUFFER_SIZE or TORCH_NCCL_TRACE_BUFFER_SIZE)."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is not None and torch.cuda.is_available():
        path.write_bytes(dump())
