"""One merge in a process of its own: start it, follow its output, cancel it.

The process is the command that a user would give, on a pseudo-terminal, so that it draws its progress bars: a text up
to a line feed is a message, what follows the last carriage return is the bar. Cancelling is Ctrl-C (SIGINT).
"""

import os
import pty
import re
import signal
import subprocess
import termios
import threading
import time
import tty
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trinity.errors import UserError

COLUMNS = 72
"""Width of the bars."""
PATIENCE = 20
"""Seconds that a merge may take to end after SIGINT, before it is killed. What is left can be resumed all the same."""
_LINES = 1000
_TRACEBACK = "Traceback (most recent call last):"
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PERCENT = re.compile(r"\b(\d{1,3})%\|")
_BAR = re.compile(r"^.*?\b\d{1,3}%\|.*?(\[[^\]]*\]|$)")
"""tqdm's bar, to the bracket that ends it; a message may follow on the same line, where the bar was not closed."""


class MergeJob:
    """The merge that runs, or the last one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._reader: threading.Thread | None = None
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._bar = ""
        self._started = self._ended = 0.0
        self._about: dict[str, Any] = {}
        self._cancelled = False

    def start(self, command: Sequence[str], about: dict[str, Any]) -> None:
        """Start a command.

        Args:
            command: the program and its words.
            about: what `status` adds for the page.
        Raises:
            UserError: a merge is running.
        """
        with self._lock:
            if self.running:
                raise UserError("a merge is running; wait for it, or cancel it")
            self._lines.clear()
            self._bar, self._about, self._cancelled = "", about, False
            terminal, inner = pty.openpty()
            tty.setraw(inner)  # line feeds stay as they are
            termios.tcsetwinsize(inner, (24, COLUMNS))
            try:
                self._process = subprocess.Popen(
                    list(command), stdin=subprocess.DEVNULL, stdout=inner, stderr=inner, start_new_session=True,
                    env=os.environ | {"TERM": "xterm", "PYTHONUNBUFFERED": "1"},
                )  # fmt: skip
            except OSError:
                os.close(terminal)
                raise
            finally:
                os.close(inner)
            self._started, self._ended = time.monotonic(), 0.0
            self._reader = threading.Thread(target=self._read, args=(self._process, terminal), daemon=True)
            self._reader.start()

    @property
    def running(self) -> bool:
        """Whether the process is running, or its last output is still to be read."""
        return self._reader is not None and self._reader.is_alive()

    def cancel(self) -> None:
        """Interrupt the merge as Ctrl-C does; nothing if none runs."""
        process = self._process
        if process is not None and self.running:
            self._cancelled = True
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)

    def stop(self) -> None:
        """Cancel, and wait for the end; after PATIENCE, or at another Ctrl-C, kill."""
        self.cancel()
        if self._reader is None or self._process is None:
            return
        try:
            self._reader.join(PATIENCE)
        finally:
            if self._reader.is_alive():
                self._process.kill()
                self._reader.join()

    def wait(self) -> None:
        """Wait for the end."""
        if self._reader is not None:
            self._reader.join()

    def status(self) -> dict[str, Any]:
        """State, output and bar, for the page.

        Returns:
            `state` (idle, running, finished, cancelled or failed), `seconds`, `lines`, `bar`, `percent` of the bar (or
            None), and what `start` was given as `about`.
        """
        found, lines, state = _PERCENT.search(self._bar), list(self._lines), self._state()
        if state == "cancelled" and _TRACEBACK in lines:  # SIGINT came while Python imported
            del lines[lines.index(_TRACEBACK) :]
        return self._about | {
            "state": state,
            "seconds": round((self._ended or time.monotonic()) - self._started) if self._process else 0,
            "lines": lines,
            "bar": self._bar,
            "percent": int(found[1]) if found else None,
        }

    def finished(self, name: str) -> Path | None:
        """A path of `about`, once the merge ended well."""
        value = self._about.get(name)
        return Path(value) if value and self._state() == "finished" else None

    def _state(self) -> str:
        if self._process is None:
            return "idle"
        if self.running:
            return "running"
        if self._process.returncode == 0:
            return "finished"
        return "cancelled" if self._cancelled else "failed"

    def _read(self, process: subprocess.Popen, terminal: int) -> None:
        """Read the output to its end, then the exit code."""
        rest = b""
        while True:
            try:
                piece = os.read(terminal, 1 << 16)
            except OSError:  # EIO: the last process closed the terminal
                break
            if not piece:
                break
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if shown := _BAR.sub("", last_text(line)).strip():  # a closed bar says nothing more
                    self._lines.append(shown)
            self._bar = last_text(rest)
        os.close(terminal)
        process.wait()
        self._bar = ""
        if process.returncode and not self._cancelled and (process.returncode < 0 or not self._lines):
            self._lines.append(explain_ending(process.returncode))
        self._ended = time.monotonic()


def explain_ending(code: int) -> str:
    """A sentence for a process that did not say itself why it failed.

    Args:
        code: as `subprocess.Popen.returncode`.
    """
    if code >= 0:
        return f"error: the merge ended with exit code {code} and printed nothing"
    hint = "; the system does this where memory runs out" if code == -signal.SIGKILL else ""
    return f"error: the merge was ended by {signal.Signals(-code).name}{hint}; merge again, and it continues"


def last_text(line: bytes) -> str:
    """What a terminal shows of a line that carriage returns overwrite: the last piece that is not blank."""
    pieces = [_ESCAPE.sub("", piece).strip() for piece in line.decode(errors="replace").split("\r")]
    return next((piece for piece in reversed(pieces) if piece), "")
