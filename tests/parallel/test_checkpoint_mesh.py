"""Asynchronous saves, and what all ranks must agree on about checkpoints, on one process and on two."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from tests.parallel.mesh_runs import config_of
from tests.parallel.saving_runs import LAST, MESH, WORDS, bytes_by_step, on_ranks, plain_run, slow_run
from trinity.checkpoint.directory import CheckpointDirectory
from trinity.checkpoint.save import Writer
from trinity.errors import Failure
from trinity.parallel import mesh
from trinity.training import train_step, trainer
from trinity.training.train_step import StepResult
from trinity.training.trainer import pretrain


@pytest.fixture(autouse=True)
def _destroy_process_group() -> Iterator[None]:
    """plain_run and slow_run leave the process group of this process open, as they must in the pool."""
    yield
    mesh.stop()


@pytest.mark.parametrize("world", [1, 2])
def test_asynchronous_save_holds_the_state_of_its_step(
    recipe: Callable, processes: Callable, synchronous_checkpoints: Callable, tmp_path: Path, world: int
) -> None:
    """Training meanwhile changes weights, momentum, biases and data: the files equal those of synchronous saves."""
    expected = synchronous_checkpoints(world)
    mesh.stop()
    words = [*WORDS, *MESH[world]]
    assert on_ranks(processes, world, slow_run, recipe(tmp_path / "goes_on"), words) == [0] * world
    saved = bytes_by_step(CheckpointDirectory.at(tmp_path / "goes_on"))
    assert list(expected) == [2, 4, 6]
    assert saved == expected


def test_save_without_the_host_copy_differs(
    recipe: Callable, synchronous_checkpoints: Callable, tmp_path: Path
) -> None:
    """The comparison above can fail: a save of the tensors themselves holds weights of later steps."""
    expected = synchronous_checkpoints(1)
    mesh.stop()
    assert slow_run(recipe(tmp_path / "wrong"), WORDS, copies=False) == 0
    saved = bytes_by_step(CheckpointDirectory.at(tmp_path / "wrong"))
    assert saved[LAST] == expected[LAST]
    for step in (2, 4):
        wrong = {name for name in expected[step] if saved[step][name] != expected[step][name]}
        assert "model.head.weight" in wrong
        assert any(name.startswith("optim.") for name in wrong)


def step_after_the_save(*args: Any) -> StepResult:
    """train_step, after the save in flight has ended."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    return train_step.train_step(*args)


def full_disk_run(settings: dict, words: list[str], broken_rank: int) -> str:
    """Run with a disk that is full for one rank when step 4 is written; returns this rank's error."""
    write_data = Writer.write_data

    def write(writer: Writer, *args: Any) -> Any:
        if writer.step == 4 and writer.rank == broken_rank:
            raise OSError(28, "No space left on device", "x.distcp")
        return write_data(writer, *args)

    with (
        mock.patch.object(Writer, "write_data", write),
        mock.patch.object(mesh, "stop"),
        mock.patch.object(trainer, "train_step", step_after_the_save),
    ):
        try:
            pretrain(config_of(settings, words), [])
        except Failure as failure:
            return str(failure)
    return "no failure"


@pytest.mark.parametrize(("world", "broken_rank", "asynchronous"), [(1, 0, "true"), (1, 0, "false"), (2, 1, "true")])
def test_disk_full_for_one_rank(
    recipe: Callable, processes: Callable, tmp_path: Path, world: int, broken_rank: int, asynchronous: str
) -> None:
    """All ranks end with that rank's error, the previous checkpoint is whole, and the same command resumes.

    They end after the step in which the save failed, before the next save is due.
    """
    words = [*WORDS, *MESH[world], f"checkpoint.asynchronous={asynchronous}"]
    settings = recipe(tmp_path / "run")
    errors = on_ranks(processes, world, full_disk_run, settings, words, broken_rank)
    full = "the disk is full while writing x.distcp; free some space and run the same command again"
    assert errors == [f"rank 1: {full}" if broken_rank else full] * world
    assert (tmp_path / "run/metrics.jsonl").read_text().count("\n") == (5 if asynchronous == "true" else 4)
    assert CheckpointDirectory.at(tmp_path / "run").newest_intact(ignore) == 2
    assert on_ranks(processes, world, plain_run, settings, words) == [0] * world
    assert CheckpointDirectory.at(tmp_path / "run").complete_steps() == [2, 4, 6]


def ignore(*_: object, **__: object) -> None:
    """A Note that drops its event."""


def newest_intact_on_rank(run: str) -> SimpleNamespace:
    """The step that this rank would resume from, and its warnings."""
    warnings: list[str] = []
    step = CheckpointDirectory.at(Path(run)).newest_intact(lambda kind, message, **_: warnings.append(message))
    return SimpleNamespace(step=step, warnings=warnings)


def test_every_rank_takes_the_same_checkpoint(recipe: Callable, processes: Callable, tmp_path: Path) -> None:
    """One rank reads the damaged file; all ranks take the checkpoint before, and only rank 0 reports it."""
    run = tmp_path / "run"
    assert processes(2).run(plain_run, recipe(run), [*WORDS, *MESH[2]]) == [0, 0]
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        path = CheckpointDirectory.at(run).path_of(LAST) / name
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :])
        first, second = processes(2).run(newest_intact_on_rank, str(run))
        assert (first.step, second.step) == (4, 4)
        assert (len(first.warnings), second.warnings) == (1, [])
        assert f"({name} has changed since it was written)" in first.warnings[0]
        if name != ".metadata":
            path.write_bytes(whole)
    assert processes(2).run(plain_run, recipe(run), [*WORDS, *MESH[2]]) == [0, 0]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(event["kind"], event["rank"]) for event in events if event["kind"] == "checkpoint_damaged"] == [
        ("checkpoint_damaged", 0)
    ]
    assert CheckpointDirectory.at(run).newest_intact(ignore) == LAST
