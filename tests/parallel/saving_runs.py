"""Runs that save checkpoints, on one process and on two: as configured, and with slow writes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from tests.parallel.mesh_runs import config_of
from trinity.checkpoint import save as saver
from trinity.checkpoint.directory import CheckpointDirectory
from trinity.checkpoint.load import empty_tensors, load
from trinity.checkpoint.save import Writer
from trinity.parallel import mesh
from trinity.training import train_step, trainer
from trinity.training.train_step import StepResult
from trinity.training.trainer import pretrain

WORDS = [
    "batch.sequences=4",
    "batch.ramp=[]",
    "evaluation.every=0",
    "run.steps=6",
    "checkpoint.every=2",
    "checkpoint.keep=9",
]
MESH = {1: [], 2: ["parallel.shard=2", "parallel.expert=2"]}
LAST = 6


def slow_run(settings: dict, words: list[str], copies: bool = True) -> int:
    """Run with slow writes: writing step s waits until training has made steps s + 1 and s + 2."""
    steps: list[int] = []

    def step(*args: Any) -> StepResult:
        result = train_step.train_step(*args)
        steps.append(1)
        return result

    copy = saver.copy_to_host if copies else lambda state, buffers: state
    with (
        slow_writes(lambda writer: len(steps) >= min(writer.step + 2, LAST)),
        mock.patch.object(mesh, "stop"),
        mock.patch.object(trainer, "train_step", step),
        mock.patch.object(saver, "copy_to_host", copy),
    ):
        return pretrain(config_of(settings, words), [])


@contextmanager
def slow_writes(may_begin: Callable[[Writer], bool]) -> Iterator[None]:
    """Delay each write until may_begin(writer) is true."""
    write_data = Writer.write_data

    def wait_and_write(writer: Writer, *args: Any) -> Any:
        deadline = time.monotonic() + 30
        while not may_begin(writer):
            assert time.monotonic() < deadline, "training waits for a save that is in flight"
            time.sleep(0.002)
        return write_data(writer, *args)

    with mock.patch.object(Writer, "write_data", wait_and_write):
        yield


def plain_run(settings: dict, words: list[str]) -> int:
    """Run without any change."""
    with mock.patch.object(mesh, "stop"):
        return pretrain(config_of(settings, words), [])


def on_ranks(processes: Callable, world: int, case: Callable, *args: Any) -> list:
    """case(*args) in this process, or on every rank of the pool."""
    return processes(world).run(case, *args) if world > 1 else [case(*args)]


def bytes_by_step(checkpoints: CheckpointDirectory) -> dict[int, dict[str, bytes]]:
    """The bytes of every tensor, by step and name."""
    tensors = {}
    for step in checkpoints.complete_steps():
        state = empty_tensors(checkpoints.path_of(step), "")
        load(state, checkpoints.path_of(step))
        tensors[step] = {name: tensor.flatten().view(torch.uint8).numpy().tobytes() for name, tensor in state.items()}
    return tensors
