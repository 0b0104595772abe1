"""A merge that is killed, meets a full disk, or whose models change: nothing half-made looks whole."""

import errno
import json
import os
import pickle
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.malformed.refusals import refusal
from tests.merging.conftest import recipe
from trinity.errors import FAILURE, Failure, UserError, explain
from trinity.io.local import file_lock
from trinity.merging import merge, merge_models, writer
from trinity.merging.sources import FolderSource

SIZE = 60_000
"""Bytes of a file: the merged models have five."""


def content() -> dict:
    return recipe("dare_ties", "ab", True, parameters={"density": 0.5})


def run(folder: Path, **options: object) -> None:
    merge(content(), folder, max_shard_bytes=SIZE, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def expected(family: Path) -> dict[str, bytes]:
    """The bytes of the undisturbed merge."""
    run(family / "undisturbed")
    found = files(family / "undisturbed")
    assert len([name for name in found if name.endswith(".safetensors")]) > 3
    return found


class Counted:
    """Counts the system calls that change files, and calls `at` before number `stop`."""

    def __init__(self, patch: pytest.MonkeyPatch, stop: int, at: Callable[[], None]) -> None:
        self.count, self._stop, self._at = 0, stop, at
        for owner, name in ((os, "pwrite"), (os, "replace"), (os, "fsync"), (os, "unlink"), (Path, "rename")):
            patch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, function: Callable) -> Callable:
        def call(*words: object) -> object:
            self.count += 1
            if self.count == self._stop:
                self._at()
            return function(*words)

        return call


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked process; returns its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def test_killed_at_any_moment(family: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before some call that changes a file: the folder is not there, and the next merge gives the same bytes."""
    with monkeypatch.context() as patch:
        counted = Counted(patch, -1, lambda: None)
        run(family / "count")
    moments = [1, 2, 3, *range(7, counted.count, counted.count // 9), *range(counted.count - 12, counted.count + 1)]
    for moment in moments:
        out = family / f"out{moment}"

        def killed(moment: int = moment, out: Path = out) -> None:
            with pytest.MonkeyPatch.context() as patch:
                Counted(patch, moment, lambda: os.kill(os.getpid(), signal.SIGKILL))
                run(out)

        assert os.WTERMSIG(in_child(killed)) == signal.SIGKILL
        if out.exists():  # killed after the folder had its name
            assert files(out) == expected
        else:
            run(out)
        assert files(out) == expected, moment
        assert not (family / f".{out.name}.partial").exists()


def test_finished_files_are_kept(family: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted merge goes on where it was; with another recipe or other models it begins anew."""
    written: list[str] = []
    original = writer.write_file

    def interrupted(file: writer.OutputFile, *words: object) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file.name)
        original(file, *words)

    monkeypatch.setattr(merge_models, "write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(family / "out")
    assert not (family / "out").exists()

    def noted(file: writer.OutputFile, *words: object) -> None:
        written.append(file.name)
        original(file, *words)

    monkeypatch.setattr(merge_models, "write_file", noted)
    written.clear()
    run(family / "out")
    assert len(written) == len([name for name in expected if name.endswith(".safetensors")]) - 2
    assert files(family / "out") == expected
    for change in (lambda: None, lambda: os.utime(family / "a" / "config.json")):
        monkeypatch.setattr(merge_models, "write_file", interrupted)
        written.clear()
        with pytest.raises(KeyboardInterrupt):
            merge(content() | {"seed": 7}, family / "out", max_shard_bytes=SIZE, overwrite=True)
        change()
        monkeypatch.setattr(merge_models, "write_file", noted)
        written.clear()
        run(family / "out", overwrite=True)
        assert len(written) == len([name for name in expected if name.endswith(".safetensors")])
        assert files(family / "out") == expected


def test_a_tokenizer_that_changes_before_the_resumption(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the embedding follow the tokenizer: a finished embedding of the old one is not kept."""
    wanted = content() | {"tokenizer": {"source": "a"}}
    original, written = writer.write_file, []

    def interrupted(*words: object) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(0)
        original(*words)

    with monkeypatch.context() as patch:
        patch.setattr(merge_models, "write_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge(wanted, family / "out", max_shard_bytes=SIZE)
    text = json.loads((family / "a" / "tokenizer.json").read_text())
    vocab = text["model"]["vocab"]
    first, second = list(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (family / "a" / "tokenizer.json").write_text(json.dumps(text))
    merge(wanted, family / "out", max_shard_bytes=SIZE)
    merge(wanted, family / "expected", max_shard_bytes=SIZE)
    assert files(family / "out") == files(family / "expected")


def test_a_full_disk(family: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence with exit code 1; the same command again continues."""

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        counted = Counted(patch, -1, lambda: None)
        run(family / "count")
    for moment in (2, counted.count // 2, counted.count - 15):
        with monkeypatch.context() as patch:
            Counted(patch, moment, full)
            with pytest.raises(OSError, match="No space left") as failure:
                run(family / f"out{moment}")
        code, sentence = explain(failure.value)
        assert code == FAILURE
        assert "the disk is full" in sentence
        assert not (family / f"out{moment}").exists()
        run(family / f"out{moment}")
        assert files(family / f"out{moment}") == expected


def test_a_disk_that_is_too_small(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 10_000))
    with pytest.raises(Failure, match=r"needs 0\.0 GB more and its disk has 0\.0 GB free"):
        run(family / "out")
    assert not (family / "out").exists()


@pytest.mark.parametrize("change", ["longer", "shorter", "touched", "removed"])
def test_a_model_that_changes(family: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """While it is read: refused, and nothing is left."""
    path = sorted((family / "b").glob("model-*.safetensors"))[-1]
    original = FolderSource.read
    calls = []

    def read(self: FolderSource, *words: object) -> torch.Tensor:
        calls.append(0)
        if len(calls) == 50:
            if change == "longer":
                path.write_bytes(path.read_bytes() + b"x")
            elif change == "shorter":
                path.write_bytes(path.read_bytes()[:-30_000])
            elif change == "touched":
                os.utime(path)
            else:
                path.unlink()
        return original(self, *words)

    monkeypatch.setattr(FolderSource, "read", read)
    with pytest.raises((UserError, OSError)) as failure:
        run(family / "out")
    code, sentence = explain(failure.value)
    assert code == 2
    assert any(words in sentence for words in ("b changed while it was read", "became shorter", "No such file"))
    assert not (family / "out").exists()


def test_no_pickle_is_opened(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (family / "a" / "pytorch_model.bin").write_bytes(b"not a pickle")

    def forbidden(*words: object, **more: object) -> None:
        raise AssertionError("a pickle was opened")

    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, forbidden)
    run(family / "out")


def test_two_merges_into_one_folder(family: Path) -> None:
    (family / ".out.partial").mkdir()
    with file_lock(family / ".out.partial"):
        assert "another merge is writing" in refusal(lambda: run(family / "out"), family)


def test_an_interrupted_replacement(family: Path, expected: dict[str, bytes]) -> None:
    """The earlier merge stays until the new one is whole."""
    run(family / "out")

    def killed() -> None:
        with pytest.MonkeyPatch.context() as patch:
            Counted(patch, 100, lambda: os.kill(os.getpid(), signal.SIGKILL))
            merge(recipe(), family / "out", max_shard_bytes=SIZE, overwrite=True)

    in_child(killed)
    assert files(family / "out") == expected
