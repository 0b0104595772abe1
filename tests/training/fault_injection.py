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


def kill_while_writing_files(times: int) -> mock._patch:
    """Kill before the n-th tensor is written; a checkpoint of the test's model has some 150."""
    return mock.patch.object(filesystem, "_write_item", replace_nth_call(times, filesystem._write_item))


def kill_at_publication(name: str, times: int, after: bool = False) -> mock._patch:
    """Kill at the n-th write of COMPLETE or latest: before its temporary file is renamed, or just after."""
    write = checkpoint.write_atomically

    def write_and_die(path: Path, text: str) -> None:
        path.with_name(path.name + ".tmp").write_text(text)
        if after:
            write(path, text)
        kill()

    matching = replace_nth_call(times, write, lambda path, text: path.name == name, write_and_die)
    return mock.patch.object(checkpoint, "write_atomically", matching)


def kill_during_deletion(name: str) -> mock._patch:
    """Kill just after the first deletion of a file of that name in an old checkpoint."""
    unlink = Path.unlink

    def unlink_and_die(path: Path, **words: bool) -> None:
        unlink(path, **words)
        kill()

    matching = replace_nth_call(1, unlink, lambda path, **words: path.name == name and path.exists(), unlink_and_die)
    return mock.patch.object(Path, "unlink", matching)


def replace_nth_call(
    times: int, function: Callable, counts: Callable = lambda *args, **words: True, instead: Callable = kill
) -> Callable:
    """The function, with `instead` in place of its n-th call for which `counts` is true."""
    remaining = [times]

    def call(*args: Any, **words: Any) -> Any:
        remaining[0] -= counts(*args, **words)
        return (instead if remaining[0] == 0 and counts(*args, **words) else function)(*args, **words)

    return call


def kill_before_removal() -> mock._patch:
    """Kill before the remaining files of an old checkpoint are deleted."""
    return mock.patch.object(checkpoint.shutil, "rmtree", kill)


# moment: the fault, and the steps whose checkpoints are complete afterwards
MOMENTS = {
    "the first files": (partial(kill_while_writing_files, 3), []),
    "later files": (partial(kill_while_writing_files, 200), [2]),
    "the first publish": (partial(kill_at_publication, "COMPLETE", 1), []),
    "a later publish": (partial(kill_at_publication, "COMPLETE", 2), [2]),
    "just published": (partial(kill_at_publication, "COMPLETE", 2, after=True), [2, 4]),
    "writing latest": (partial(kill_at_publication, "latest", 2), [2, 4]),
    "after deleting COMPLETE": (partial(kill_during_deletion, "COMPLETE"), [4]),
    "after deleting .metadata": (partial(kill_during_deletion, ".metadata"), [4]),
    "before deleting the rest": (kill_before_removal, [4]),
}
QUICK = ["later files", "the first publish", "after deleting COMPLETE"]
