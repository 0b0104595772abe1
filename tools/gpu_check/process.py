"""A worker process seen from the supervisor: started ahead, handed one part, ended with everything that it started."""

import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from trinity.io.json_files import to_json

GRACE = 5
"""Seconds between SIGTERM and SIGKILL."""

KILLED = 2
"""Seconds within which a killed process must have ended; one stuck in the driver does not."""

COMMAND = [sys.executable, "-m", "gpu_check.worker"]


class Worker:
    """A process in a group of its own, so that a signal reaches what it started and nothing else."""

    def __init__(self, log: Path) -> None:
        """Start one; CHECK_WORKER is another command to start, for tests.

        Args:
            log: file for its output, until hand_over names the part.
        """
        self.log = log
        command = shlex.split(os.environ.get("CHECK_WORKER", "")) or COMMAND
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, process_group=0
            )

    def runs(self) -> bool:
        """Whether the process has not ended."""
        return self.process.poll() is None

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self.process.poll()

    def hand_over(self, task: dict[str, Any], log: Path) -> None:
        """Give it its part; stdin stays open, because the worker ends itself when it closes."""
        self.log = self.log.rename(log)
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it died while it imported: its exit code tells
            self.process.stdin.write(to_json(task).encode() + b"\n")
            self.process.stdin.flush()

    def end(self, at_once: bool) -> bool:
        """End it and what it started; returns False if it does not end (stuck in the driver).

        Args:
            at_once: SIGKILL without SIGTERM before.
        """
        for name in (signal.SIGKILL,) if at_once else (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, name)
            deadline = time.monotonic() + (KILLED if name == signal.SIGKILL else GRACE)
            while self.runs() and time.monotonic() < deadline:
                time.sleep(0.02)
        return not self.runs()
