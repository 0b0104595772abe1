"""A directory that becomes read-only, and a system clock that is set back and forward during a run."""

import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.training.fault_injection import replace_nth_call
from tests.training.file_systems import make_read_only, read_only, unmount
from tests.training.forked_ranks import run
from tests.training.run_files import MEASURED, metrics, refuse, status, train
from trinity.monitor import events
from trinity.training import trainer
from trinity.training.train_step import StepResult, train_step


def test_a_run_directory_that_is_read_only(settings: dict, tmp_path: Path) -> None:
    """A new run there, and a resumed one: a sentence, code 2, and no file is changed."""
    folder = Path(settings["run"]["dir"])
    assert train(settings, "run.steps=3") == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with read_only(tmp_path):
        for place in (folder, tmp_path / "new"):
            sentence = f"the run directory {place} cannot be written (Read-only file system); set run.dir"
            assert refuse(settings, f"run.dir={place}") == sentence
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()


@contextmanager
def read_only_from(folder: Path, step: int) -> Iterator[None]:
    """Make the folder read-only before the n-th step."""

    def shut_and_step(*args: Any) -> StepResult:
        make_read_only(folder)
        return train_step(*args)

    with mock.patch.object(trainer, "train_step", replace_nth_call(step, train_step, instead=shut_and_step)):
        yield


SLOW = [(".", 2), ("checkpoints", 1), ("checkpoints", 2)]


@pytest.mark.parametrize(("shut", "world"), [(".", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_a_run_directory_that_becomes_read_only(settings: dict, undisturbed: Callable, shut: str, world: int) -> None:
    """From step 5 on: all ranks end at their next write, with one sentence; once it is writable, the run resumes."""
    folder, words = Path(settings["run"]["dir"]), ["checkpoint.asynchronous=false"]
    shut_folder = folder / shut
    with read_only(folder.parent):  # or skip here: the rank cannot
        pass
    try:
        assert run(settings, *words, world=world, fault=partial(read_only_from, shut_folder, 5)) == [2] * world
    finally:
        unmount(shut_folder)
    before, last = folder.with_suffix(".log").read_text().splitlines()[-2:]
    assert before.startswith("step 6/8 ")
    place = folder / "checkpoints/step_00000006"
    assert last == f"error: {place} is on a read-only file system; write to another folder"
    assert status(folder)["state"] == ("running" if shut == "." else "stopped")
    assert run(settings, *words, world=world) == [0] * world
    assert metrics(folder) == metrics(undisturbed(world))


@contextmanager
def jumping_clock() -> Iterator[None]:
    """Each reading of the system clock is an hour before or after the last one."""
    hours = itertools.cycle([0, -1, 1])
    real = time.time

    def jumping() -> float:
        return real() + 3600 * next(hours)

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(hours=next(hours))

    with (
        mock.patch.object(time, "time", jumping),
        mock.patch.object(events, "datetime", Jumping),
    ):
        yield


def test_a_clock_that_jumps(settings: dict, uninterrupted: Path, capsys: pytest.CaptureFixture) -> None:
    """The run makes the same steps, no duration is negative or an hour long, and there is no alarm."""
    folder = Path(settings["run"]["dir"])
    settings["health"] = {"heartbeat_seconds": 60}
    with jumping_clock():
        assert train(settings) == 0
    assert metrics(folder) == metrics(uninterrupted)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [line[key] for line in lines for key in line.keys() & MEASURED if key.endswith("seconds")]
    assert len(seconds) == 2 * 8 + 2
    happened = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    # a start says how old its process is, and this one has other tests behind it
    seconds += [event["seconds"] for event in happened if "seconds" in event and event["kind"] != "start"]
    assert all(0 <= value < 600 for value in seconds)
    assert all(0 < line["goodput"] <= 1 and line["tokens_per_second"] > 0 for line in lines)
    assert {event["kind"] for event in happened} == {"start", "checkpoint", "evaluation", "finish"}
    assert len(re.findall(r"ETA 0:0\d:\d\d$", capsys.readouterr().err, re.MULTILINE)) == 8
