"""CheckpointDirectory and Checkpoint: every kind of damage is detected and named, and the checkpoint before it is used.

The same files are read as a local folder and through a URL, with the same results.
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
    """A copy of two_steps, for a test to damage."""
    shutil.copytree(two_steps, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ignore(*_: object, **__: object) -> None:
    """A Note that drops its event."""


def newest_intact(run: Path) -> tuple[int, list[str]]:
    """The step that a run would resume from, and its warnings; equal by folder and by URL."""
    step, warnings = newest_intact_in(CheckpointDirectory.at(run))
    url_step, url_warnings = newest_intact_in(at_url(run))
    assert (url_step, [message.replace("norename://", "") for message in url_warnings]) == (step, warnings)
    return step, warnings


def newest_intact_in(checkpoints: CheckpointDirectory) -> tuple[int, list[str]]:
    warnings: list[tuple[str, str]] = []
    step = checkpoints.newest_intact(lambda *words, **_: warnings.append(words))
    assert all(kind == "checkpoint_damaged" and "\n" not in message for kind, message in warnings)
    return step, [message for _, message in warnings]


def at_url(run: Path) -> CheckpointDirectory:
    """The same checkpoints through a URL."""
    return CheckpointDirectory.at(run, f"norename://{run}/checkpoints")


@pytest.fixture(params=["folder", "url"])
def checkpoints(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointDirectory:
    """The checkpoints of tmp_path / "run", by folder and by URL."""
    return (CheckpointDirectory.at if request.param == "folder" else at_url)(tmp_path / "run")


def folder_of(run: Path, step: int) -> Path:
    """The folder of a checkpoint in a run directory."""
    return run / f"checkpoints/step_{step:08d}"


def flip_bit(path: Path, bit: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_files_of_a_checkpoint(run: Path) -> None:
    """FILES is complete, so the tests below cover every file."""
    assert sorted(path.name for path in folder_of(run, 6).iterdir()) == FILES
    assert newest_intact(run) == (6, [])


@pytest.mark.parametrize("name", [*FILES, pytest.param("COMPLETE, every bit", marks=pytest.mark.slow)])
def test_flipped_bit(run: Path, name: str) -> None:
    """40 random bits of each file; of COMPLETE one bit of each byte, and, as a slow test, every bit."""
    name, _, every = name.partition(",")
    path = folder_of(run, 6) / name
    whole = path.read_bytes()
    bits = range(8 * len(whole))
    if name == "COMPLETE" and not every:
        bits = [8 * byte + byte % 8 for byte in range(len(whole))]
    for bit in bits if name == "COMPLETE" else random.Random(name).sample(bits, 40):
        flip_bit(path, bit)
        step, (sentence,) = newest_intact(run)
        assert step == 3, bit
        assert f"{folder_of(run, 6)} is damaged (" in sentence
        if name != "COMPLETE":
            assert f"({name} has changed since it was written) and is not used" in sentence
        path.write_bytes(whole)
    assert newest_intact(run) == (6, [])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", [0, 1, -1])
def test_truncated_file(run: Path, name: str, left: int) -> None:
    """Each file truncated to nothing, to one byte, and by one byte."""
    path = folder_of(run, 6) / name
    path.write_bytes(path.read_bytes()[:left])
    step, warnings = newest_intact(run)
    if name == "COMPLETE" and left == -1:  # only the newline at the end may be missing
        assert (step, warnings) == (6, [])
        return
    assert (step, len(warnings)) == (3, 1)
    assert "is damaged (" in warnings[0]
    assert (f"{name} has " if name != "COMPLETE" else "its COMPLETE is missing or cannot be read") in warnings[0]


@pytest.mark.parametrize("name", FILES)
def test_missing_file(run: Path, name: str) -> None:
    """Without COMPLETE the checkpoint is an interrupted save; without another file it is damaged."""
    (folder_of(run, 6) / name).unlink()
    step, (sentence,) = newest_intact(run)
    assert step == 3
    expected = "has no COMPLETE, as a save that was cut off leaves it" if name == "COMPLETE" else f"({name} is missing)"
    assert expected in sentence


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "3", "{}", '{"files": {}}', '{"files": []}', '{"files": {".metadata": 5}}', "\x00", "{" * 99],
)
def test_malformed_complete(run: Path, text: str) -> None:
    """The checkpoint is named, the one before it is used, and the tools do not list it."""
    (folder_of(run, 6) / "COMPLETE").write_text(text)
    step, (sentence,) = newest_intact(run)
    assert step == 3
    assert "is damaged (its COMPLETE is missing or cannot be read) and is not used" in sentence
    assert CheckpointDirectory.at(run).pick_complete(None) == 3


@pytest.mark.parametrize("text", ["step_00000099\n", "", "\x00"])
def test_latest_is_a_hint(run: Path, text: str) -> None:
    """A wrong, empty or missing `latest` changes nothing: no code reads it."""
    (run / "checkpoints/latest").write_text(text)
    assert newest_intact(run) == (6, [])
    (run / "checkpoints/latest").unlink()
    assert newest_intact(run) == (6, [])


def test_no_intact_checkpoint(run: Path) -> None:
    """All damaged: UserError naming each. All without COMPLETE: step 0, a run that starts from the beginning."""
    flip_bit(folder_of(run, 6) / "__0_0.distcp", 999)
    (folder_of(run, 3) / "__0_0.distcp").unlink()
    with pytest.raises(UserError) as mistake:
        CheckpointDirectory.at(run).newest_intact(ignore)
    assert str(mistake.value) == (
        f"every checkpoint in {run} is damaged: step_00000006 (__0_0.distcp has changed since it was written), "
        "step_00000003 (__0_0.distcp is missing); put one back from a copy, or start a new run with another run.dir"
    )
    for step in (3, 6):
        (folder_of(run, step) / "COMPLETE").unlink()
    step, warnings = newest_intact(run)
    assert (step, len(warnings)) == (0, 2)
    assert newest_intact(run / "nowhere") == (0, [])


def test_newest_intact_before_a_step(run: Path, checkpoints: CheckpointDirectory) -> None:
    """Only checkpoints of earlier steps than a given one, as a rollback needs."""
    assert checkpoints.newest_intact(before=6) == 3
    assert checkpoints.newest_intact(before=3) == 0


def test_pick_intact(run: Path, checkpoints: CheckpointDirectory, capsys: pytest.CaptureFixture) -> None:
    """A damaged requested step is an error; without a requested step, a warning and the newest intact one."""
    flip_bit(folder_of(run, 6) / ".metadata", 999)
    assert checkpoints.pick_intact(3) == 3
    with pytest.raises(
        UserError, match=r"is damaged \(\.metadata has changed since it was written\); take another of \[3"
    ):
        checkpoints.pick_intact(6)
    assert capsys.readouterr().err == ""
    assert checkpoints.pick_intact(None) == 3
    assert capsys.readouterr().err.startswith("warning: the checkpoint ")


def test_unreadable_disk(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read error counts as damage and is named with the system's message."""

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
    """Of steps 1 to 9 the retention policy keeps `left`; nothing else is in the folder."""
    for step in range(1, 10):
        save(state_of(step), checkpoints, step, keep, keep_every)
    assert checkpoints.complete_steps() == left
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert names == {checkpoints.path_of(step).name for step in left} | {"latest"}
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_00000009\n"


def test_retention_of_incomplete_and_later_ones(run: Path, checkpoints: CheckpointDirectory, group: None) -> None:
    """A folder without COMPLETE and .metadata is deleted; a checkpoint of a later step does not count as newest."""
    (run / "checkpoints/step_00000002").mkdir()
    (run / "checkpoints/step_00000002/__0_0.distcp").write_bytes(b"cut off")
    (run / "checkpoints/step_00000004").mkdir()
    (run / "checkpoints/step_00000004/.metadata").write_bytes(b"somebody lost its COMPLETE")
    save(state_of(5), checkpoints, 5, keep=1)
    names = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert names == ["step_00000004", "step_00000005", "step_00000006"]
    assert CheckpointDirectory.at(run).complete_steps() == [5, 6]


def test_save_over_an_earlier_attempt(run: Path, checkpoints: CheckpointDirectory, group: None) -> None:
    """The step's folder, complete or not, is emptied first, and loading returns the new state."""
    for leftover in ("__1_0.distcp", "COMPLETE.tmp"):
        (folder_of(run, 6) / leftover).write_bytes(b"old")
    save({"model.a": torch.full((2,), 7.0)}, checkpoints, 6, keep=2)
    assert sorted(path.name for path in folder_of(run, 6).iterdir()) == FILES
    state = empty_tensors(checkpoints.path_of(6), "model.")
    load(state, checkpoints.path_of(6))
    assert torch.equal(state["model.a"], torch.full((2,), 7.0))


@pytest.mark.parametrize("moment", ["COMPLETE", ".metadata", "files"])
def test_interrupted_deletion(run: Path, group: None, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Interrupted at any point, the remains are not complete, and the next save deletes them."""
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
    assert ("step_00000003" in left) == (moment == "COMPLETE")  # it may be whole, with only its COMPLETE lost


def test_checksums_in_complete(run: Path, checkpoints: CheckpointDirectory, group: None, tmp_path: Path) -> None:
    """COMPLETE equals zlib over the whole content; checksum_file also of a file of several blocks."""
    import zlib

    save(state_of(6) | {"model.b": torch.randn(3, 1 << 20)}, checkpoints, 6, keep=2)
    listed = json.loads((folder_of(run, 6) / "COMPLETE").read_text())["files"]
    for name in (".metadata", "__0_0.distcp"):
        content = (folder_of(run, 6) / name).read_bytes()
        assert listed[name] == {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
    content = random.Random(1).randbytes(2 * checksum.BLOCK + 5)
    (tmp_path / "large").write_bytes(content)
    assert checkpoint.checksum_file(tmp_path / "large") == (len(content), f"{zlib.crc32(content):08x}")


def test_full_disk_at_any_byte(group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the full disk, not the RuntimeError of torch's zip writer that follows."""
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
    for again in (0, whole):  # the disk stays full, or another program frees space just then
        for first in (*range(0, size, 3000), size - 1):
            room = [first, again]
            with pytest.raises(Failure, match="the disk is full"):
                save(state, checkpoints, 2, keep=5)
    room = [whole, whole]
    save(state, checkpoints, 2, keep=5)
    assert checkpoints.complete_steps() == [1, 2]
