"""The console of a run: a line every `log.every` steps above a progress bar, and where things are at the end.

Only the first rank prints. Where no bar can be drawn (a pipe, a terminal without a width) the lines stand alone.
"""

import sys
import time
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm

from trinity.terminal import format_duration, messages_above_bar, say, terminal_width

BAR = "{desc} |{bar}| {percentage:.0f}%"
MARGIN = 4
"""Columns right of the bar, where the terminal writes ^C: on the next line it would push the bar up."""


class Console:
    """The sink that a person watches.

    The bar is opened with the first step and removed by close: messages from before and after need not respect it.

    Args:
        first, total: the step the run starts after, and its last one.
        every: steps between lines.
    """

    def __init__(self, first: int, total: int, every: int) -> None:
        self._every, self._total, self._made, self._began = every, total, 0, time.monotonic()
        self._bar: tqdm | None = None
        self._open = ExitStack()

    def write(self, record: dict[str, Any]) -> None:
        """Show one step."""
        step, validation = record["step"], prefixed(record, "validation_loss.")
        head = f"step {step}/{self._total}"
        if "loss" not in record:  # the validation of a continued model before its first step
            say("  ".join([head, *validation]))
            return
        self._made += 1
        left = (time.monotonic() - self._began) / self._made * (self._total - step)
        if terminal_width():
            self._draw(step, f"{head}  {loss_text(record)}  ETA {format_duration(left)}")
        if step % self._every == 0 or step == self._total or validation:
            say("  ".join([head, *_step_figures(record), *validation, f"ETA {format_duration(left)}"]))

    def _draw(self, step: int, text: str) -> None:
        if self._bar is None:
            self._open.enter_context(messages_above_bar())
            begun = {
                "total": self._total,
                "initial": step - 1,
                "desc": text,
                "ncols": max(terminal_width() - MARGIN, 1),
            }
            bar = tqdm(file=sys.stderr, bar_format=BAR, leave=False, miniters=1, **begun)
            self._bar = self._open.enter_context(bar)
        self._bar.ncols = max(terminal_width() - MARGIN, 1)  # the window may have another size now
        self._bar.set_description_str(text, refresh=False)
        self._bar.update(step - self._bar.n)

    def go_back(self, step: int) -> None:
        """The bar goes back with the next step."""

    def close(self) -> None:
        """Remove the bar; the lines stay."""
        self._open.close()


def prefixed(record: dict[str, Any], prefix: str) -> list[str]:
    """["loss.code 4.8371", …] of the fields that begin with `prefix`, such as validation_loss."""
    found = {name: value for name, value in record.items() if name.startswith(prefix) and value is not None}
    return [f"{name.removeprefix('validation_')} {value:.4f}" for name, value in found.items()]


def loss_text(record: dict[str, Any]) -> str:
    loss = record["loss"]
    return "loss nan" if loss is None else f"loss {loss:.4f}"


def _step_figures(record: dict[str, Any]) -> list[str]:
    grad_norm = record["grad_norm"]
    return [
        loss_text(record),
        "grad nan" if grad_norm is None else f"grad {grad_norm:.3f}",
        f"{record['tokens_per_second']:,.0f} tok/s",
        *([f"mfu {record['mfu']:.1%}"] if "mfu" in record else []),
        *([f"vio {record['max_violation']:.2f}"] if "max_violation" in record else []),
        *(["SKIPPED"] if record["skipped"] else []),
    ]
