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
from trinity.checkpoint import checkpoint, file_systems
from trinity.checkpoint.checkpoint import Checkpoint
from trinity.checkpoint.directory import CheckpointDirectory
from trinity.checkpoint.load import empty_tensors, load
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
    run = tmp_path_factory.mktemp("two")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for step in (3, 6):
        save(state_of(step), CheckpointDirectory.at(run), step, keep=5)
    dist.destroy_process_group()
    return run


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
    step, said = look(CheckpointDirectory.at(run))
    there, said_there = look(at_url(run))
    assert (there, [message.replace("norename://", "") for message in said_there]) == (step, said)
    return step, said


def look(checkpoints: CheckpointDirectory) -> tuple[int, list[str]]:
    said: list[tuple[str, str]] = []
    step = checkpoints.newest_intact(lambda *words, **_: said.append(words))
    assert all(kind == "checkpoint_damaged" and "\n" not in message for kind, message in said)
    return step, [message for _, message in said]


def at_url(run: Path) -> CheckpointDirectory:
    """The same checkpoints by a URL."""
    return CheckpointDirectory.at(run, f"norename://{run}/checkpoints")


@pytest.fixture(params=["folder", "url"])
def checkpoints(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointDirectory:
    """Where tmp_path / "run" has its checkpoints, by folder and by URL."""
    return (CheckpointDirectory.at if request.param == "folder" else at_url)(tmp_path / "run")


def folder_of(run: Path, step: int) -> Path:
    """The folder of a checkpoint in a run directory."""
    return run / f"checkpoints/step_{step:08d}"


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_the_folder_has_these_files(run: Path) -> None:
    """So that the cases below are all."""
    assert sorted(path.name for path in folder_of(run, 6).iterdir()) == FILES
    assert found(run) == (6, [])


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit(run: Path, name: str) -> None:
    """Anywhere in any file; of COMPLETE, which says what is right, each single bit."""
    path = folder_of(run, 6) / name
    bits = range(8 * path.stat().st_size)
    whole = path.read_bytes()
    for bit in bits if name == "COMPLETE" else random.Random(name).sample(bits, 40):
        flip(path, bit)
        step, (sentence,) = found(run)
        assert step == 3, bit
        assert f"{folder_of(run, 6)} is damaged (" in sentence
        if name != "COMPLETE":
            assert f"({name} has changed since it was written) and is not used" in sentence
        path.write_bytes(whole)
    assert found(run) == (6, [])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", [0, 1, -1])
def test_cut_short(run: Path, name: str, left: int) -> None:
    """To nothing, to a byte, by a byte."""
    path = folder_of(run, 6) / name
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
    (folder_of(run, 6) / name).unlink()
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
    (folder_of(run, 6) / "COMPLETE").write_text(text)
    step, (sentence,) = found(run)
    assert step == 3
    assert "is damaged (its COMPLETE is missing or cannot be read) and is not used" in sentence
    assert CheckpointDirectory.at(run).pick_complete(None) == 3


@pytest.mark.parametrize("text", ["step_00000099\n", "", "\x00"])
def test_latest_is_a_hint(run: Path, text: str) -> None:
    """It dangles, or is nonsense: nothing reads it."""
    (run / "checkpoints/latest").write_text(text)
    assert found(run) == (6, [])
    (run / "checkpoints/latest").unlink()
    assert found(run) == (6, [])


def test_none_is_left(run: Path) -> None:
    """All damaged: refused, naming each; all unfinished: a run that never had one begins anew."""
    flip(folder_of(run, 6) / "__0_0.distcp", 999)
    (folder_of(run, 3) / "__0_0.distcp").unlink()
    with pytest.raises(UserError) as mistake:
        CheckpointDirectory.at(run).newest_intact(ignore)
    assert str(mistake.value) == (
        f"every checkpoint in {run} is damaged: step_00000006 (__0_0.distcp has changed since it was written), "
        "step_00000003 (__0_0.distcp is missing); put one back from a copy, or start afresh with another run.dir"
    )
    for step in (3, 6):
        (folder_of(run, step) / "COMPLETE").unlink()
    step, said = found(run)
    assert (step, len(said)) == (0, 2)
    assert found(run / "nowhere") == (0, [])


def test_before(run: Path, checkpoints: CheckpointDirectory) -> None:
    """Only checkpoints of earlier steps than a given one, for a run that goes back."""
    assert checkpoints.newest_intact(before=6) == 3
    assert checkpoints.newest_intact(before=3) == 0


def test_the_one_that_was_asked_for(run: Path, checkpoints: CheckpointDirectory, capsys: pytest.CaptureFixture) -> None:
    """A tool says so instead of taking another; without a wish it warns and takes the newest that is whole."""
    flip(folder_of(run, 6) / ".metadata", 999)
    assert checkpoints.pick_intact(3) == 3
    with pytest.raises(
        UserError, match=r"is damaged \(\.metadata has changed since it was written\); take another of \[3"
    ):
        checkpoints.pick_intact(6)
    assert capsys.readouterr().err == ""
    assert checkpoints.pick_intact(None) == 3
    assert capsys.readouterr().err.startswith("warning: the checkpoint ")


def test_a_disk_that_cannot_be_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while reading is damage too, with the system's words."""

    def broken(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(checkpoint, "checksum_file", broken)
    with pytest.raises(UserError, match=r"cannot be read \(Input/output error\)"):
        CheckpointDirectory.at(run).newest_intact(ignore)


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
def test_retention(
    checkpoints: CheckpointDirectory, tmp_path: Path, group: None, keep: int, keep_every: int, left: list[int]
) -> None:
    """Which of steps 1 to 9 are there at the end, and that nothing but checkpoints is."""
    for step in range(1, 10):
        save(state_of(step), checkpoints, step, keep, keep_every)
    assert checkpoints.complete_steps() == left
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert names == {checkpoints.path_of(step).name for step in left} | {"latest"}
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_00000009\n"


def test_what_is_superfluous_and_what_is_not(run: Path, checkpoints: CheckpointDirectory, group: None) -> None:
    """Leftovers without COMPLETE and .metadata go; a later checkpoint never costs an earlier one."""
    (run / "checkpoints/step_00000002").mkdir()
    (run / "checkpoints/step_00000002/__0_0.distcp").write_bytes(b"cut off")
    (run / "checkpoints/step_00000004").mkdir()
    (run / "checkpoints/step_00000004/.metadata").write_bytes(b"somebody lost its COMPLETE")
    save(state_of(5), checkpoints, 5, keep=1)
    names = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert names == ["step_00000004", "step_00000005", "step_00000006"]
    assert CheckpointDirectory.at(run).complete_steps() == [5, 6]


def test_over_what_an_earlier_attempt_left(run: Path, checkpoints: CheckpointDirectory, group: None) -> None:
    """The folder of that step is cleaned first, complete or not, and what is read is the new one."""
    for leftover in ("__1_0.distcp", "COMPLETE.tmp"):
        (folder_of(run, 6) / leftover).write_bytes(b"old")
    save({"model.a": torch.full((2,), 7.0)}, checkpoints, 6, keep=2)
    assert sorted(path.name for path in folder_of(run, 6).iterdir()) == FILES
    state = empty_tensors(checkpoints.path_of(6), "model.")
    load(state, checkpoints.path_of(6))
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
    monkeypatch.setattr(checkpoint.shutil, "rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        Checkpoint(folder_of(run, 3)).remove()
    monkeypatch.undo()
    assert rmtree is shutil.rmtree
    assert CheckpointDirectory.at(run).complete_steps() == [6]
    save(state_of(7), CheckpointDirectory.at(run), 7, keep=2)
    left = {path.name for path in (run / "checkpoints").glob("step_*")}
    assert left - {"step_00000003"} == {"step_00000006", "step_00000007"}
    assert ("step_00000003" in left) == (moment == "COMPLETE")  # it may be a whole one whose COMPLETE somebody lost


def test_the_sums_are_those_of_the_files(
    run: Path, checkpoints: CheckpointDirectory, group: None, tmp_path: Path
) -> None:
    """COMPLETE against zlib over the whole content, also of a file of several blocks."""
    import zlib

    save(state_of(6) | {"model.b": torch.randn(3, 1 << 20)}, checkpoints, 6, keep=2)
    listed = json.loads((folder_of(run, 6) / "COMPLETE").read_text())["files"]
    for name in (".metadata", "__0_0.distcp"):
        content = (folder_of(run, 6) / name).read_bytes()
        assert listed[name] == {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
    content = random.Random(1).randbytes(2 * checksum.BLOCK + 5)
    (tmp_path / "large").write_bytes(content)
    assert checkpoint.checksum_file(tmp_path / "large") == (len(content), f"{zlib.crc32(content):08x}")


def test_a_disk_that_fills_up_anywhere(group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever in the files it is: a sentence about the disk, and no mistake of torch's zip writer that follows."""
    state = {f"model.{name}": torch.arange(3000.0) for name in "abc"}
    checkpoints = CheckpointDirectory.at(tmp_path)
    save(state, checkpoints, 1, keep=5)
    sizes = {path.name: path.stat().st_size for path in folder_of(tmp_path, 1).iterdir()}
    write = file_systems._FirstErrorFile._write

    def limited(file: file_systems._FirstErrorFile, data: object) -> int:
        if file.tell() + memoryview(data).nbytes > room[0]:
            room[0] = room[1]
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    monkeypatch.setattr(file_systems._FirstErrorFile, "_write", limited)
    size, whole = sizes["__0_0.distcp"], max(sizes.values())
    for again in (0, whole):  # the disk stays full, or somebody removes a file just then
        for first in (*range(0, size, 3000), size - 1):
            room = [first, again]
            with pytest.raises(Failure, match="the disk is full"):
                save(state, checkpoints, 2, keep=5)
    room = [whole, whole]
    save(state, checkpoints, 2, keep=5)
    assert checkpoints.complete_steps() == [1, 2]
