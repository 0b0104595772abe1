"""Faults at a chosen moment of a run, each a context manager that a rank runs in (forked_ranks.py)."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from torch.distributed.checkpoint import filesystem

from trinity.checkpoint import checkpoint

WORDS = ("checkpoint.every=2", "checkpoint.keep=1")


def kill(*_: object, **__: object) -> None:
    """Kill this process at once, as the out-of-memory killer or a power cut does."""
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_files(times: int) -> mock._patch:
    """Before the n-th tensor is written; a checkpoint of the test's model has some 200."""
    return mock.patch.object(filesystem, "_write_item", nth(times, filesystem._write_item))


def in_the_publish(name: str, times: int, after: bool = False) -> mock._patch:
    """When COMPLETE or latest is written for the n-th time: between content and name, or just after."""
    write = checkpoint.write_atomically

    def write_and_die(path: Path, text: str) -> None:
        path.with_name(path.name + ".tmp").write_text(text)
        if after:
            write(path, text)
        kill()

    matching = nth(times, write, lambda path, text: path.name == name, write_and_die)
    return mock.patch.object(checkpoint, "write_atomically", matching)


def in_the_deletion(name: str) -> mock._patch:
    """Just after the first of the old checkpoint's files of that name is gone."""
    unlink = Path.unlink

    def unlink_and_die(path: Path, **words: bool) -> None:
        unlink(path, **words)
        kill()

    matching = nth(1, unlink, lambda path, **words: path.name == name and path.exists(), unlink_and_die)
    return mock.patch.object(Path, "unlink", matching)


def nth(
    times: int, function: Callable, counts: Callable = lambda *args, **words: True, instead: Callable = kill
) -> Callable:
    """The function, but something else at its n-th call that counts."""
    left = [times]

    def call(*args: Any, **words: Any) -> Any:
        left[0] -= counts(*args, **words)
        return (instead if left[0] == 0 and counts(*args, **words) else function)(*args, **words)

    return call


def in_the_removal() -> mock._patch:
    """Before the rest of an old checkpoint goes."""
    return mock.patch.object(checkpoint.shutil, "rmtree", kill)


# moment: how it is brought about, and the steps whose checkpoints are complete afterwards
MOMENTS = {
    "the first files": (partial(in_the_files, 3), []),
    "later files": (partial(in_the_files, 300), [2]),
    "the first publish": (partial(in_the_publish, "COMPLETE", 1), []),
    "a later publish": (partial(in_the_publish, "COMPLETE", 2), [2]),
    "just published": (partial(in_the_publish, "COMPLETE", 2, after=True), [2, 4]),
    "the hint": (partial(in_the_publish, "latest", 2), [2, 4]),
    "the deletion's first file": (partial(in_the_deletion, "COMPLETE"), [4]),
    "the deletion's second file": (partial(in_the_deletion, ".metadata"), [4]),
    "the deletion's rest": (in_the_removal, [4]),
}
QUICK = ["later files", "the first publish", "the deletion's first file"]
