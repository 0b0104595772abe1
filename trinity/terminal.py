"""Messages and progress on stderr: a bar on a terminal with lines above it, plain lines in a pipe or log file.

Everything that is printed while a bar may be open goes through `say`. Results of a tool go to stdout by print, when its
bars are closed.
"""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from threading import RLock
from typing import Any, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

LINE_SECONDS = 30
"""Between two lines of progress where no bar can be drawn. Not from the report."""
CLEAR_LINE = "\r\x1b[K"

Item = TypeVar("Item")

tqdm.set_lock(RLock())  # of this process alone: tqdm's own one takes a semaphore of the system, and helpers with it


def say(text: str) -> None:
    """Print a message on stderr, above an open bar.

    A console that cannot be written (a closed pipe, a full disk under a log file) ends no run.
    """
    if width():
        text = CLEAR_LINE + text  # of another rank's bar, or of the ^C that the terminal wrote behind this one's
    with suppress(OSError):
        tqdm.write(text, file=sys.stderr)


def width() -> int:
    """Columns of the terminal on stderr; 0 where no bar can be drawn: a pipe, or a terminal without a width."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return 0
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 0


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 3725 → 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


@contextmanager
def messages_above_bar() -> Iterator[None]:
    """Print warnings and log messages of libraries above an open bar too."""
    before = warnings.showwarning

    def show(message: Any, category: Any, name: str, lineno: int, file: Any = None, line: str | None = None) -> None:
        if file is not None:
            before(message, category, name, lineno, file, line)
        else:
            say(warnings.formatwarning(message, category, name, lineno, line).rstrip("\n"))

    warnings.showwarning = show
    try:
        with logging_redirect_tqdm([logging.root, logging.getLogger("torch")]):  # torch's logger has its own handler
            yield
    finally:
        warnings.showwarning = before


class Progress:
    """Progress of a long task: a bar on a terminal, a line every LINE_SECONDS elsewhere; a context manager.

    Args:
        title: what is done, such as "reading".
        total: how much there is, in units; None where that is not known.
        unit: such as "document", without a plural s.
        show: False draws and prints nothing.
        scaled: write 1.24G for 1,240,000,000.

    Attributes:
        n: units done.
    """

    def __init__(self, title: str, total: float | None, unit: str, show: bool = True, scaled: bool = False) -> None:
        self.n = 0
        self._title, self._total, self._unit, self._scaled, self._show = title, total, unit, scaled, show
        self._skipped, self._text = 0, ""
        self._began = self._said = time.monotonic()
        self._bar: tqdm | None = None
        if show and width():
            self._bar = tqdm(desc=title, total=total, unit=unit, unit_scale=scaled, file=sys.stderr, dynamic_ncols=True)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, more: float = 1) -> None:
        """Count `more` units as done."""
        self.update_to(self.n + more)

    def update_to(self, done: float) -> None:
        """Count `done` units in all as done."""
        self.n = done
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif self._show and time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            say(self._line())

    def skip_to(self, done: float) -> None:
        """Count `done` units as done by an earlier process, which is no part of this one's speed."""
        self.n = self._skipped = done
        if self._bar is not None:
            self._bar.initial = self._bar.n = done

    def describe(self, text: str) -> None:
        """Show `text` after the figures."""
        self._text = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, each one unit."""
        with self:
            for item in items:
                yield item
                self.update()

    def _line(self) -> str:
        """For example "reading: 31%, 1.24GB of 4.00GB, 0:03:12 left"."""
        parts = [f"{self._count(self.n)} {self._units}".strip()]
        if self._total:
            left = self.seconds / max(self.n - self._skipped, 1) * (self._total - self.n)
            parts[0] = f"{self._count(self.n)} of {self._count(self._total)} {self._units}".strip()
            parts = [f"{self.n / self._total:.0%}", *parts, f"{clock(left)} left"]
        return f"{self._title}: {', '.join(filter(None, [*parts, self._text]))}"

    @property
    def _units(self) -> str:
        return "" if self._scaled else f"{self._unit}s"

    def _count(self, amount: float) -> str:
        return tqdm.format_sizeof(amount, self._unit) if self._scaled else f"{amount:,}"
