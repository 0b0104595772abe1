"""Messages and progress on stderr: a progress bar with messages above it on a terminal, plain lines in a pipe or file.

While a bar may be open, print with `say`. Tools print their results to stdout with print, after their bars are closed.
"""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from threading import RLock
from typing import TextIO, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

LINE_SECONDS = 30
"""Seconds between lines of progress where no bar can be drawn."""
CLEAR_LINE = "\r\x1b[K"

Item = TypeVar("Item")

tqdm.set_lock(RLock())  # tqdm's default lock takes a system semaphore and starts a helper process


def say(text: str) -> None:
    """Print a message on stderr, above an open bar.

    Errors of writing (a closed pipe, a full disk under a log file) are ignored, so that they end no run.
    """
    if terminal_width():
        text = CLEAR_LINE + text  # clear another rank's bar, or the ^C that the terminal printed
    with suppress(OSError):
        tqdm.write(text, file=sys.stderr)


def terminal_width() -> int:
    """Columns of the terminal on stderr; 0 if no bar can be drawn: a pipe, or a terminal without a width."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return 0
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 0


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds: 3725 → 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


@contextmanager
def messages_above_bar() -> Iterator[None]:
    """Context manager: print warnings and log messages of libraries above an open bar."""
    before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if file is not None:
            before(message, category, filename, lineno, file, line)
        else:
            say(warnings.formatwarning(message, category, filename, lineno, line).rstrip("\n"))

    warnings.showwarning = show
    try:
        with logging_redirect_tqdm([logging.root, logging.getLogger("torch")]):  # torch's logger has its own handler
            yield
    finally:
        warnings.showwarning = before


class Progress:
    """Context manager for the progress of a long task: a bar on a terminal, else a line every LINE_SECONDS.

    Args:
        title: name of the task, such as "reading".
        total: number of units; None if unknown.
        unit: singular, such as "document".
        show: if False, draw and print nothing.
        scaled: print 1.24G for 1,240,000,000.

    Attributes:
        n: units done.
    """

    def __init__(self, title: str, total: float | None, unit: str, show: bool = True, scaled: bool = False) -> None:
        self.n: float = 0
        self._title, self._total, self._unit, self._scaled, self._show = title, total, unit, scaled, show
        self._skipped: float = 0
        self._text = ""
        self._start = self._last_line = time.monotonic()
        self._bar: tqdm | None = None
        if show and terminal_width():
            self._bar = tqdm(desc=title, total=total, unit=unit, unit_scale=scaled, file=sys.stderr, dynamic_ncols=True)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, more: float = 1) -> None:
        """Add `more` units to those done."""
        self.update_to(self.n + more)

    def update_to(self, done: float) -> None:
        """Set the number of units done."""
        self.n = done
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif self._show and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            say(self._line())

    def skip_to(self, done: float) -> None:
        """Set the number of units that an earlier process did; they do not count for the speed."""
        self.n = self._skipped = done
        if self._bar is not None:
            self._bar.initial = self._bar.n = done

    def describe(self, text: str) -> None:
        """Show `text` after the numbers."""
        self._text = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, counting each as one unit."""
        with self:
            for item in items:
                yield item
                self.update()

    def _line(self) -> str:
        """A line such as "reading: 31%, 1.24GB of 4.00GB, 0:03:12 left"."""
        parts = [f"{self._count(self.n)} {self._units}".strip()]
        if self._total:
            left = self.seconds / max(self.n - self._skipped, 1) * (self._total - self.n)
            parts[0] = f"{self._count(self.n)} of {self._count(self._total)} {self._units}".strip()
            parts = [f"{self.n / self._total:.0%}", *parts, f"{format_duration(left)} left"]
        return f"{self._title}: {', '.join(filter(None, [*parts, self._text]))}"

    @property
    def _units(self) -> str:
        return "" if self._scaled else f"{self._unit}s"

    def _count(self, amount: float) -> str:
        return tqdm.format_sizeof(amount, self._unit) if self._scaled else f"{amount:,}"
