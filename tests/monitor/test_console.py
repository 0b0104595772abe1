"""The console logger on a terminal and in a pipe: lines above a bar, or lines alone."""

import io
import logging
import sys
import warnings
from pathlib import Path

import pytest

from tests.screen import Terminal
from trinity.checkpoint.directory import warn
from trinity.monitor import console
from trinity.monitor.console import Console
from trinity.monitor.events import Events


class Clock:
    """The console's time.monotonic, set by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(console.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The console's clock."""
    return Clock(monkeypatch)


def record(step: int, **fields: object) -> dict:
    """The record of a step, with further fields."""
    metrics = {"step": step, "loss": 10 - step, "grad_norm": 1.5, "tokens_per_second": 2500.0, "skipped": False}
    return metrics | {"max_violation": 0.25} | fields


def line(step: int, total: int, seconds: int, more: str = "") -> str:
    """The console's line of a record."""
    return f"step {step}/{total}  loss {10 - step:.4f}  grad 1.500  2,500 tok/s  vio 0.25{more}  ETA 0:00:{seconds:02d}"


def make_steps(logger: Console, clock: Clock, steps: range) -> None:
    """Log steps that take a second each."""
    for step in steps:
        clock.now += 1
        logger.write(record(step))


def test_lines_and_messages_stay_above_the_bar(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on a line of its own, in order; the bar is the last line, and gone at the end."""
    with Terminal(90, monkeypatch) as screen:
        monkeypatch.setattr(logging.getLogger("torch"), "handlers", [logging.StreamHandler()])
        logger = Console(0, 6, 2)
        make_steps(logger, clock, range(1, 3))
        events = Events(tmp_path, 0, 2)
        events.note("checkpoint", "not for the console")
        events.note("spike", "far above")
        warn("checkpoint_damaged", "cut off")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn_explicit("slow", UserWarning, "library.py", 7)
        logging.getLogger("torch").warning("of torch")
        make_steps(logger, clock, range(3, 5))
        *lines, bar = screen.lines()
        assert lines == [
            line(2, 6, 4), "rank 0, step 2: spike: far above", "warning: cut off", "library.py:7: UserWarning: slow",
            "of torch", line(4, 6, 2),
        ]  # fmt: skip
        assert bar.startswith("step 4/6  loss 6.0000  ETA 0:00:02 |")
        assert bar.endswith("| 67%")
        logger.close()
        assert screen.lines() == lines


def test_ctrl_c_does_not_push_the_bar_up(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal prints ^C after the bar: there is room for it, and the next message clears both."""
    with Terminal(90, monkeypatch) as screen:
        logger = Console(0, 9, 100)
        make_steps(logger, clock, range(1, 2))
        screen.echo("^C")
        (bar,) = screen.lines()
        assert bar.endswith("^C")
        assert len(bar) < 90
        warn("", "asked to stop")
        message, bar = screen.lines()
        assert message == "warning: asked to stop"
        assert bar.endswith("| 11%")
        logger.close()


@pytest.mark.parametrize("kind", ["pipe", "no width", "dumb"])
def test_plain_lines(kind: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bar and no control characters where there is no terminal, or one without a width or a cursor."""
    with Terminal(90 if kind == "dumb" else 0, monkeypatch) as screen:
        pipe = io.StringIO()
        if kind == "pipe":
            monkeypatch.setattr(sys, "stderr", pipe)
        elif kind == "dumb":
            monkeypatch.setenv("TERM", "dumb")
        logger = Console(0, 5, 2)
        make_steps(logger, clock, range(1, 6))
        logger.close()
        screen.lines()
        expected = "".join(f"{one}\n" for one in [line(2, 5, 3), line(4, 5, 1), line(5, 5, 0)])
        assert pipe.getvalue() + screen.raw.replace("\r\n", "\n") == expected


def test_the_window_may_change(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar takes the width that the terminal has now."""
    with Terminal(90, monkeypatch) as screen:
        logger = Console(0, 900, 1000)
        make_steps(logger, clock, range(1, 2))
        before = len(screen.lines()[0])
        monkeypatch.setattr(console, "terminal_width", lambda: 60)
        logger.write(record(2))
        warn("", "drawn anew")
        assert (before, len(screen.lines()[-1])) == (86, 56)
        logger.close()


def test_a_rollback(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    """Repeated steps count as made: the time left follows from all steps so far, also before the first one."""
    logger = Console(4, 8, 1)
    make_steps(logger, clock, range(5, 6))
    logger.rewind(3)
    make_steps(logger, clock, range(4, 6))
    assert capsys.readouterr().err.splitlines() == [line(5, 8, 3), line(4, 8, 4), line(5, 8, 3)]


def test_records_with_missing_values(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    """A validation before the first step, a loss that is not finite, a model without experts."""
    logger = Console(0, 3, 1)
    logger.write({"step": 0, "validation_loss.code": 3.25})
    clock.now = 1
    logger.write({"step": 1, "loss": None, "grad_norm": None, "tokens_per_second": 10.0, "skipped": True})
    logger.write(record(2, loss=float("nan"), mfu=0.5, **{"validation_loss.code": 3.0, "validation_loss.x": None}))
    assert capsys.readouterr().err.splitlines() == [
        "step 0/3  loss.code 3.2500",
        "step 1/3  loss nan  grad nan  10 tok/s  SKIPPED  ETA 0:00:02",
        "step 2/3  loss nan  grad 1.500  2,500 tok/s  mfu 50.0%  vio 0.25  loss.code 3.0000  ETA 0:00:00",
    ]


def test_validation_sets_of_a_continued_model(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    """Losses, then the balance of each set, then what is left of each budget; without a step before the first one."""
    fields: dict = {"step": 0, "tokens": 0, "sequences": 0}
    for name, loss in {"old": 2.5, "new": 4.0}.items():
        fields |= {f"validation_loss.{name}": loss, f"validation_max_violation.{name}": 0.5}
        fields |= {f"validation_max_violation_mean.{name}": 0.25, f"validation_dead_experts.{name}": 0.125}
    logger = Console(0, 6, 2, {"old": 0.1})
    logger.write(fields | {"forgetting.old": 0.0})
    assert capsys.readouterr().err == (
        "step 0/6  loss.old 2.5000  loss.new 4.0000  vio.old 0.50  dead.old 12.5%  vio.new 0.50  dead.new 12.5%  "
        "forgot.old 0.0000 of 0.1\n"
    )
