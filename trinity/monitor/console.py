"""The console logger of a run: a line every `log.every` steps, above a progress bar.

Only rank 0 prints. If no bar can be drawn (a pipe, a terminal without a width), the lines are printed alone.
"""

import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm

from trinity.terminal import format_duration, messages_above_bar, say, terminal_width

NO_BUDGETS: Mapping[str, float] = {}
LOAD = "validation_max_violation."
"""Prefix of a validation set's MaxVio in metrics.jsonl."""
BAR = "{desc} |{bar}| {percentage:.0f}%"
MARGIN = 4
"""Columns right of the bar, for the ^C that the terminal echoes; without room it would wrap and push the bar up."""


class Console:
    """Logs steps to the console.

    The bar opens with the first step and close removes it, so messages before and after it are printed plainly.

    Args:
        first, total: steps made before this start, and the number of the run's last step.
        every: steps between lines.
        budgets: health.forgetting, by validation set.
    """

    def __init__(self, first: int, total: int, every: int, budgets: Mapping[str, float] = NO_BUDGETS) -> None:
        self._budgets = budgets
        self._every, self._total, self._steps, self._started = every, total, 0, time.monotonic()
        self._bar: tqdm | None = None
        self._open = ExitStack()

    def write(self, record: dict[str, Any]) -> None:
        """Print a line if one is due, and update the bar."""
        step = record["step"]
        validation = validation_fields(record, self._budgets)
        head = f"step {step}/{self._total}"
        if "loss" not in record:  # the validation of a continued model before its first step
            say("  ".join([head, *validation]))
            return
        self._steps += 1
        left = (time.monotonic() - self._started) / self._steps * (self._total - step)
        if terminal_width():
            self._draw(step, f"{head}  {loss_text(record)}  ETA {format_duration(left)}")
        if step % self._every == 0 or step == self._total or validation:
            say("  ".join([head, *_step_fields(record), *validation, f"ETA {format_duration(left)}"]))

    def _draw(self, step: int, text: str) -> None:
        if self._bar is None:
            self._open.enter_context(messages_above_bar())
            start: dict[str, Any] = {"total": self._total, "initial": step - 1, "desc": text}
            start["ncols"] = max(terminal_width() - MARGIN, 1)
            bar = tqdm(file=sys.stderr, bar_format=BAR, leave=False, miniters=1, **start)
            self._bar = self._open.enter_context(bar)
        self._bar.ncols = max(terminal_width() - MARGIN, 1)  # the window may have been resized
        self._bar.set_description_str(text, refresh=False)
        self._bar.update(step - self._bar.n)

    def rewind(self, step: int) -> None:
        """Do nothing: the next step sets the bar."""

    def close(self) -> None:
        """Remove the bar; the lines remain."""
        self._open.close()


def prefixed(record: dict[str, Any], prefix: str) -> list[str]:
    """["loss.code 4.8371", …] of the fields that begin with `prefix`, such as validation_loss."""
    fields = {name: value for name, value in record.items() if name.startswith(prefix) and value is not None}
    return [f"{name.removeprefix('validation_')} {value:.4f}" for name, value in fields.items()]


def validation_fields(record: dict[str, Any], budgets: Mapping[str, float] = NO_BUDGETS) -> list[str]:
    """["loss.code 4.8371", "vio.code 0.52", "dead.code 0.0%", "forgot.code 0.0312 of 0.1", …]: every validation set."""
    fields = [*prefixed(record, "validation_loss."), *prefixed(record, "validation_loss_average.")]
    for name in (name.removeprefix(LOAD) for name in record if name.startswith(LOAD)):
        fields += [
            f"vio.{name} {record[LOAD + name]:.2f}",
            f"dead.{name} {record['validation_dead_experts.' + name]:.1%}",
        ]
    for name, budget in budgets.items():
        if (rise := record.get(f"forgetting.{name}")) is not None:
            fields.append(f"forgot.{name} {rise:.4f} of {budget:g}")
    return fields


def loss_text(record: dict[str, Any]) -> str:
    """The loss with four decimals, "loss nan" if it is not finite."""
    loss = record["loss"]
    return "loss nan" if loss is None else f"loss {loss:.4f}"


def _step_fields(record: dict[str, Any]) -> list[str]:
    grad_norm = record["grad_norm"]
    return [
        loss_text(record),
        "grad nan" if grad_norm is None else f"grad {grad_norm:.3f}",
        f"{record['tokens_per_second']:,.0f} tok/s",
        *([f"mfu {record['mfu']:.1%}"] if "mfu" in record else []),
        *([f"vio {record['max_violation']:.2f}"] if "max_violation" in record else []),
        *(["SKIPPED"] if record["skipped"] else []),
    ]
