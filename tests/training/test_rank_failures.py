"""One of two ranks hangs, dies, computes NaN or reads bad data: both ranks end, or both continue alike."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.training.fault_injection import kill, replace_nth_call
from tests.training.forked_ranks import run
from tests.training.run_files import metrics, state, status, train
from trinity.data.stream.collate import Batch
from trinity.models import Trinity
from trinity.monitor.heartbeat import Heartbeat
from trinity.training import trainer
from trinity.training.train_step import StepResult, train_step


def hang_forever(*_: object, **__: object) -> None:
    """Hang; the stacks must show this function."""
    signal.pause()


def in_forward(times: int, instead: Callable) -> mock._patch:
    """Replace the n-th forward pass."""
    return mock.patch.object(Trinity, "forward", replace_nth_call(times, Trinity.forward, instead=instead))


@contextmanager
def hang_in_forward(times: int) -> Iterator[None]:
    """Hang in the n-th forward pass; this rank's heartbeat times out before the other rank's."""
    watch = Heartbeat._watch

    def watch_early(heartbeat: Heartbeat) -> None:
        heartbeat._timeout *= 0.7
        watch(heartbeat)

    with in_forward(times, hang_forever), mock.patch.object(Heartbeat, "_watch", watch_early):
        yield


def events(folder: Path, kind: str) -> list[dict]:
    """The events of a kind."""
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_a_rank_that_hangs(settings: dict) -> None:
    """The hanging rank and the one that waits for it write their stacks and an event, and exit with 1."""
    folder = Path(settings["run"]["dir"])
    settings |= {"health": {"heartbeat_seconds": 2}, "log": {"probe_every": 0}}  # a probe would count as a forward
    assert run(settings, world=2, fault=partial(hang_in_forward, 3), rank=1) == [1, 1]
    assert "hang_forever" in (folder / "stacks.rank1.txt").read_text()
    stacks = (folder / "stacks.rank0.txt").read_text()
    assert "in train_step" in stacks
    assert "hang_forever" not in stacks
    alarms = events(folder, "heartbeat")
    assert sorted((event["rank"], event["step"]) for event in alarms) == [(0, 3), (1, 3)]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_dies(settings: dict, rank: int) -> None:
    """The other rank ends when the connection closes, long before its heartbeat; the next start resumes."""
    folder = Path(settings["run"]["dir"])
    settings["health"] = {"heartbeat_seconds": 0}
    codes = run(settings, "checkpoint.asynchronous=false", world=2, fault=partial(in_forward, 5, kill), rank=rank)
    assert codes == ([-signal.SIGKILL, 1] if rank == 0 else [1, -signal.SIGKILL])
    assert len(metrics(folder)) == 3
    assert run(settings, world=2) == [0, 0]
    assert "resuming after step 3" in folder.with_suffix(".log").read_text()
    assert [line["step"] for line in metrics(folder)] == list(range(1, 9))


@contextmanager
def nan_losses() -> Iterator[None]:
    """Make every loss of this rank NaN."""
    forward = Trinity.forward

    def spoilt(*args: Any, **words: Any) -> Any:
        losses = forward(*args, **words)
        return losses._replace(token_loss=losses.token_loss * float("nan"))

    with mock.patch.object(Trinity, "forward", spoilt):
        yield


def test_too_many_bad_steps(settings: dict) -> None:
    """All ranks exit with 3 for the NaN that one of them computes."""
    folder = Path(settings["run"]["dir"])
    settings["health"] = {"bad_steps": 2}
    assert run(settings, world=2, fault=nan_losses, rank=1) == [3, 3]
    assert [line["skipped"] for line in metrics(folder)] == [True, True]
    assert status(folder)["code"] == 3
    assert "2 steps in a row" in (folder / "STOP").read_text()


@contextmanager
def wrong_targets(step: int, rows: slice) -> Iterator[None]:
    """In the n-th step, set the targets of these rows of the rank to a token that no text has."""
    calls: list[int] = []

    def train_poisoned(model: Trinity, optimizers: Any, batch: Batch, *args: Any) -> StepResult:
        calls.append(1)
        if len(calls) == step:
            batch.targets_BS[rows] = 511
        return train_step(model, optimizers, batch, *args)

    with mock.patch.object(trainer, "train_step", train_poisoned):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_poison_in_the_rows_of_one_rank(settings: dict, tmp_path: Path, action: str) -> None:
    """Two ranks equal one process with the same wrong targets in the same rows, every second one of the batch.

    In float64; the bound is that of tests/parallel/test_every_mesh.py.
    """
    settings["health"] = {"spike": {"action": action, "window": 6, "sigma": 5}}
    settings["optim"]["muon"]["dtype"] = "float64"
    settings["run"]["steps"] = 14
    settings |= {"precision": {"compute": "float64"}, "batch": {"sequences": 12, "microbatch": 12}}
    folder, alone = Path(settings["run"]["dir"]), tmp_path / "alone"
    assert run(settings, world=2, fault=partial(wrong_targets, 13, slice(None)), rank=1) == [0, 0]
    with wrong_targets(13, slice(1, None, 2)):
        assert train(settings, f"run.dir={alone}") == 0
    (spike,) = events(folder, "spike")
    assert (spike["step"], spike["action"]) == (13, action)
    assert len(events(folder, "rollback")) == (action == "rollback")
    assert [line["skipped"] for line in metrics(folder)] == [action == "skip" and step == 13 for step in range(1, 15)]
    for line, expected in zip(metrics(folder), metrics(alone), strict=True):
        close = {key: pytest.approx(x, rel=1e-10, abs=1e-10) for key, x in expected.items() if isinstance(x, float)}
        assert line == expected | close
    assert state(folder, 14)["data.jumped"].tolist() == [[0, 0]] + [[144, 156]] * (action == "rollback")
