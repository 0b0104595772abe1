"""What counts as a checkpoint: damage of every kind is seen and named, and the checkpoint before it is used.

The same files are looked at as a folder and through a URL, and the answers must be the same.
"""

import errno
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.url_stores import register
from trinity.checkpoint import directory
from trinity.checkpoint import save as saver
from trinity.checkpoint.directory import (
    Home,
    complete_steps,
    home_of,
    newest_intact,
    pick_intact,
    pick_step,
    step_folder,
)
from trinity.checkpoint.load import load, tensors_of
from trinity.checkpoint.save import save
from trinity.errors import Failure, UserError
from trinity.io import checksum

register()

FILES = [".metadata", "COMPLETE", "__0_0.distcp"]


def state_of(step: int) -> dict[str, torch.Tensor]:
    return {"model.a": torch.arange(100.0) + step, "run.step": torch.tensor(step)}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("two")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for step in (3, 6):
        save(state_of(step), folder, step, keep=5)
    dist.destroy_process_group()
    return folder


@pytest.fixture
def run(two_steps: Path, tmp_path: Path) -> Path:
    """A copy of it to be damaged."""
    shutil.copytree(two_steps, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of one, as a run has it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ignore(*_: object, **__: object) -> None:
    """A Note that nobody reads."""


def found(run: Path) -> tuple[int, list[str]]:
    """The step that a resumed run would begin with, and what it would say; by folder and by URL."""
    step, said = look(run)
    there, said_there = look(at_url(run))
    assert (there, [message.replace("norename://", "") for message in said_there]) == (step, said)
    return step, said


def look(home: Home) -> tuple[int, list[str]]:
    said: list[tuple[str, str]] = []
    step = newest_intact(home, lambda *words, **_: said.append(words))
    assert all(kind == "checkpoint_damaged" and "\n" not in message for kind, message in said)
    return step, [message for _, message in said]


def at_url(run: Path) -> Home:
    """The same checkpoints by a URL."""
    return home_of(f"norename://{run}/checkpoints", run)


@pytest.fixture(params=["folder", "url"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Home:
    """Where tmp_path / "run" has its checkpoints, by folder and by URL."""
    return tmp_path / "run" if request.param == "folder" else at_url(tmp_path / "run")


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_the_folder_has_these_files(run: Path) -> None:
    """So that the cases below are all."""
    assert sorted(path.name for path in step_folder(run, 6).iterdir()) == FILES
    assert found(run) == (6, [])


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit(run: Path, name: str) -> None:
    """Anywhere in any file; of COMPLETE, which says what is right, each single bit."""
    path = step_folder(run, 6) / name
    bits = range(8 * path.stat().st_size)
    whole = path.read_bytes()
    for bit in bits if name == "COMPLETE" else random.Random(name).sample(bits, 40):
        flip(path, bit)
        step, (sentence,) = found(run)
        assert step == 3, bit
        assert f"{step_folder(run, 6)} is damaged (" in sentence
        if name != "COMPLETE":
            assert f"({name} has changed since it was written) and is not used" in sentence
        path.write_bytes(whole)
    assert found(run) == (6, [])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", [0, 1, -1])
def test_cut_short(run: Path, name: str, left: int) -> None:
    """To nothing, to a byte, by a byte."""
    path = step_folder(run, 6) / name
    path.write_bytes(path.read_bytes()[:left])
    step, said = found(run)
    if name == "COMPLETE" and left == -1:  # a newline at the end, and nothing else, may go
        assert (step, said) == (6, [])
        return
    assert (step, len(said)) == (3, 1)
    assert "is damaged (" in said[0]
    assert (f"{name} has " if name != "COMPLETE" else "its COMPLETE is missing or cannot be read") in said[0]


@pytest.mark.parametrize("name", FILES)
def test_missing(run: Path, name: str) -> None:
    """Without COMPLETE it is a save that was cut off; without another file it is damaged."""
    (step_folder(run, 6) / name).unlink()
    step, (sentence,) = found(run)
    assert step == 3
    expected = "has no COMPLETE, as a save that was cut off leaves it" if name == "COMPLETE" else f"({name} is missing)"
    assert expected in sentence


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "3", "{}", '{"files": {}}', '{"files": []}', '{"files": {".metadata": 5}}', "\x00", "{" * 99],
)
def test_complete_is_nonsense(run: Path, text: str) -> None:
    """Whatever it holds: the checkpoint is named, the one before it used, and the tools do not see it."""
    (step_folder(run, 6) / "COMPLETE").write_text(text)
    step, (sentence,) = found(run)
    assert step == 3
    assert "is damaged (its COMPLETE is missing or cannot be read) and is not used" in sentence
    assert pick_step(run, None) == 3


@pytest.mark.parametrize("text", ["step_00000099\n", "", "\x00"])
def test_latest_is_a_hint(run: Path, text: str) -> None:
    """It dangles, or is nonsense: nothing reads it."""
    (run / "checkpoints/latest").write_text(text)
    assert found(run) == (6, [])
    (run / "checkpoints/latest").unlink()
    assert found(run) == (6, [])


def test_none_is_left(run: Path) -> None:
    """All damaged: refused, naming each; all unfinished: a run that never had one begins anew."""
    flip(step_folder(run, 6) / "__0_0.distcp", 999)
    (step_folder(run, 3) / "__0_0.distcp").unlink()
    with pytest.raises(UserError) as mistake:
        newest_intact(run, ignore)
    assert str(mistake.value) == (
        f"every checkpoint in {run} is damaged: step_00000006 (__0_0.distcp has changed since it was written), "
        "step_00000003 (__0_0.distcp is missing); put one back from a copy, or start afresh with another run.dir"
    )
    for step in (3, 6):
        (step_folder(run, step) / "COMPLETE").unlink()
    step, said = found(run)
    assert (step, len(said)) == (0, 2)
    assert found(run / "nowhere") == (0, [])


def test_before(run: Path, home: Home) -> None:
    """Only checkpoints of earlier steps than a given one, for a run that goes back."""
    assert newest_intact(home, before=6) == 3
    assert newest_intact(home, before=3) == 0


def test_the_one_that_was_asked_for(run: Path, home: Home, capsys: pytest.CaptureFixture) -> None:
    """A tool says so instead of taking another; without a wish it warns and takes the newest that is whole."""
    flip(step_folder(run, 6) / ".metadata", 999)
    assert pick_intact(home, 3) == 3
    with pytest.raises(
        UserError, match=r"is damaged \(\.metadata has changed since it was written\); take another of \[3"
    ):
        pick_intact(home, 6)
    assert capsys.readouterr().err == ""
    assert pick_intact(home, None) == 3
    assert capsys.readouterr().err.startswith("warning: the checkpoint ")


def test_a_disk_that_cannot_be_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while reading is damage too, with the system's words."""

    def broken(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(directory, "sum_of", broken)
    with pytest.raises(UserError, match=r"cannot be read \(Input/output error\)"):
        newest_intact(run, ignore)


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [
        (1, 0, [9]),
        (2, 0, [8, 9]),
        (2, 4, [4, 8, 9]),
        (1, 3, [3, 6, 9]),
        (3, 1, list(range(1, 10))),
        (20, 0, list(range(1, 10))),
    ],
)
def test_retention(home: Home, tmp_path: Path, group: None, keep: int, keep_every: int, left: list[int]) -> None:
    """Which of steps 1 to 9 are there at the end, and that nothing but checkpoints is."""
    for step in range(1, 10):
        save(state_of(step), home, step, keep, keep_every)
    assert directory.complete_steps(home) == left
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert names == {step_folder(home, step).name for step in left} | {"latest"}
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_00000009\n"


def test_what_is_superfluous_and_what_is_not(run: Path, home: Home, group: None) -> None:
    """Leftovers without COMPLETE and .metadata go; a later checkpoint never costs an earlier one."""
    (run / "checkpoints/step_00000002").mkdir()
    (run / "checkpoints/step_00000002/__0_0.distcp").write_bytes(b"cut off")
    (run / "checkpoints/step_00000004").mkdir()
    (run / "checkpoints/step_00000004/.metadata").write_bytes(b"somebody lost its COMPLETE")
    save(state_of(5), home, 5, keep=1)
    names = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert names == ["step_00000004", "step_00000005", "step_00000006"]
    assert directory.complete_steps(run) == [5, 6]


def test_over_what_an_earlier_attempt_left(run: Path, home: Home, group: None) -> None:
    """The folder of that step is cleaned first, complete or not, and what is read is the new one."""
    for leftover in ("__1_0.distcp", "COMPLETE.tmp"):
        (step_folder(run, 6) / leftover).write_bytes(b"old")
    save({"model.a": torch.full((2,), 7.0)}, home, 6, keep=2)
    assert sorted(path.name for path in step_folder(run, 6).iterdir()) == FILES
    state = tensors_of(step_folder(home, 6), "model.")
    load(state, home, 6)
    assert torch.equal(state["model.a"], torch.full((2,), 7.0))


@pytest.mark.parametrize("moment", ["COMPLETE", ".metadata", "files"])
def test_a_deletion_that_is_cut_off(run: Path, group: None, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """At each of its moments what is left does not look whole, and the next save removes it."""
    unlink, rmtree = Path.unlink, shutil.rmtree

    def unlink_and_stop(path: Path, **words: bool) -> None:
        unlink(path, **words)
        if path.name == moment:
            raise KeyboardInterrupt

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", unlink_and_stop)
    monkeypatch.setattr(directory.shutil, "rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        directory.remove(step_folder(run, 3))
    monkeypatch.undo()
    assert rmtree is shutil.rmtree
    assert directory.complete_steps(run) == [6]
    save(state_of(7), run, 7, keep=2)
    left = {path.name for path in (run / "checkpoints").glob("step_*")}
    assert left - {"step_00000003"} == {"step_00000006", "step_00000007"}
    assert ("step_00000003" in left) == (moment == "COMPLETE")  # it may be a whole one whose COMPLETE somebody lost


def test_the_sums_are_those_of_the_files(run: Path, home: Home, group: None, tmp_path: Path) -> None:
    """COMPLETE against zlib over the whole content, also of a file of several blocks."""
    import zlib

    save(state_of(6) | {"model.b": torch.randn(3, 1 << 20)}, home, 6, keep=2)
    listed = json.loads((step_folder(run, 6) / "COMPLETE").read_text())["files"]
    for name in (".metadata", "__0_0.distcp"):
        content = (step_folder(run, 6) / name).read_bytes()
        assert listed[name] == {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
    content = random.Random(1).randbytes(2 * checksum.BLOCK + 5)
    (tmp_path / "large").write_bytes(content)
    assert directory.sum_of(tmp_path / "large") == (len(content), f"{zlib.crc32(content):08x}")


def test_a_disk_that_fills_up_anywhere(group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever in the files it is: a sentence about the disk, and no mistake of torch's zip writer that follows."""
    state = {f"model.{name}": torch.arange(3000.0) for name in "abc"}
    save(state, tmp_path, 1, keep=5)
    sizes = {path.name: path.stat().st_size for path in step_folder(tmp_path, 1).iterdir()}
    write = saver._Remembered._write

    def limited(file: saver._Remembered, data: object) -> int:
        if file.tell() + memoryview(data).nbytes > room[0]:
            room[0] = room[1]
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    monkeypatch.setattr(saver._Remembered, "_write", limited)
    size, whole = sizes["__0_0.distcp"], max(sizes.values())
    for again in (0, whole):  # the disk stays full, or somebody removes a file just then
        for first in (*range(0, size, 3000), size - 1):
            room = [first, again]
            with pytest.raises(Failure, match="the disk is full"):
                save(state, tmp_path, 2, keep=5)
    room = [whole, whole]
    save(state, tmp_path, 2, keep=5)
    assert complete_steps(tmp_path) == [1, 2]
