"""A run killed during any phase of a save, or left with a damaged checkpoint, resumes as if nothing had happened."""

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.training.fault_injection import MOMENTS, QUICK, WORDS
from tests.training.forked_ranks import run
from tests.training.run_files import checkpoint_bytes, metrics, refuse, status, train
from trinity.checkpoint import save as saver
from trinity.checkpoint.directory import CheckpointDirectory
from trinity.training.trainer import Trainer

LAST = 8


@pytest.mark.parametrize(
    "moment", [pytest.param(moment, marks=() if moment in QUICK else pytest.mark.slow) for moment in MOMENTS]
)
def test_kill_during_a_save(settings: dict, uninterrupted: Path, moment: str) -> None:
    """Resumed to its end, the run has the metrics and state of an undisturbed run, and no remains of checkpoints."""
    run_folder, (fault, complete) = Path(settings["run"]["dir"]), MOMENTS[moment]
    checkpoints, expected = CheckpointDirectory.at(run_folder), CheckpointDirectory.at(uninterrupted)
    assert run(settings, *WORDS, fault=fault) == [-signal.SIGKILL]
    assert status(run_folder)["state"] == "running"
    assert checkpoints.complete_steps() == complete
    assert train(settings, *WORDS) == 0
    assert metrics(run_folder) == metrics(uninterrupted)
    assert checkpoint_bytes(checkpoints.path_of(LAST)) == checkpoint_bytes(expected.path_of(LAST))
    assert checkpoints.complete_steps() == [LAST]


def test_resume_past_damaged_checkpoints(settings: dict, uninterrupted: Path, capsys: pytest.CaptureFixture) -> None:
    """Damaged ones are named, the one before is used, and the run ends the same; if all are damaged it is refused."""
    run = Path(settings["run"]["dir"])
    checkpoints, expected = CheckpointDirectory.at(run), CheckpointDirectory.at(uninterrupted)
    assert train(settings, "checkpoint.every=2", "checkpoint.keep=9", "run.steps=6") == 0
    for step, name in ((6, "__0_0.distcp"), (4, ".metadata")):
        path = checkpoints.path_of(step) / name
        path.write_bytes(path.read_bytes()[:-9] + b"damaged..")
    assert train(settings, "checkpoint.every=2", "checkpoint.keep=9") == 0
    errors = capsys.readouterr().err
    assert (
        f"the checkpoint {checkpoints.path_of(6)} is damaged (__0_0.distcp has changed since it was written)" in errors
    )
    assert f"the checkpoint {checkpoints.path_of(4)} is damaged (.metadata has changed since it was written)" in errors
    assert "resuming after step 2" in errors
    assert (run / "events.jsonl").read_text().count('"checkpoint_damaged"') == 2
    assert metrics(run) == metrics(uninterrupted)
    assert checkpoint_bytes(checkpoints.path_of(LAST)) == checkpoint_bytes(expected.path_of(LAST))
    assert checkpoints.complete_steps() == [2, 4, 6, 8]
    before = (run / "metrics.jsonl").read_text()
    for step in (2, 4, 6, 8):
        (checkpoints.path_of(step) / "COMPLETE").write_text("nonsense")
    assert refuse(settings).startswith(f"every checkpoint in {run} is damaged: step_00000008 (its COMPLETE is missing")
    assert (run / "metrics.jsonl").read_text() == before
    assert len(list(run.glob("checkpoints/step_*/__0_0.distcp"))) == 4


def test_warning_of_a_nearly_full_disk(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `disk` event before a save if two checkpoints like the last one do not fit; the save is still made."""
    run = Path(settings["run"]["dir"])
    checkpoints = CheckpointDirectory.at(run)
    assert train(settings, "run.steps=2") == 0
    for steps, missing in ((3, 0), (4, 1)):
        files = [path for path in checkpoints.path_of(steps - 1).iterdir() if path.name != "COMPLETE"]
        free = 2 * sum(path.stat().st_size for path in files) - missing
        monkeypatch.setattr(saver.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert train(settings, f"run.steps={steps}") == 0
        assert (run / "events.jsonl").read_text().count('"kind": "disk"') == steps - 3
    assert checkpoints.complete_steps() == [3, 4]


def test_error_during_a_save_in_flight(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another error ends the run: the save in flight is finished first."""

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "hf")

    monkeypatch.setattr(Trainer, "_export", fail)
    with pytest.raises(PermissionError):
        train(settings, "checkpoint.every=2", "export.every=2")
    assert CheckpointDirectory.at(Path(settings["run"]["dir"])).complete_steps() == [2]
