"""Killed at any moment of a checkpoint's life, or left with a damaged one: the run goes on as if nothing had been."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from killed_runs import MOMENTS, QUICK, WORDS
from run_files import bits, metrics, refuse, status, train

from trinity.training import saver
from trinity.training.checkpoint import complete_steps, step_folder
from trinity.training.loop import Training

LAST = 8
OTHERS = [moment for moment in MOMENTS if moment not in QUICK]


def killed_runs(recipe: Callable, folder: Path, moments: list[str]) -> Path:
    """Run directories, by moment, of runs that were killed then."""
    (folder / "settings.yaml").write_text(yaml.safe_dump(recipe(folder)))
    program = Path(__file__).with_name("killed_runs.py")
    words = [sys.executable, str(program), str(folder / "settings.yaml"), str(folder), *moments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(words, capture_output=True, text=True, timeout=110, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{moment}: -9" for moment in moments], done.stderr
    return folder


@pytest.fixture(scope="module")
def killed(recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed at some moments, one of each kind."""
    return killed_runs(recipe, tmp_path_factory.mktemp("killed"), QUICK)


@pytest.fixture(scope="module")
def killed_more(recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed at the other ones."""
    return killed_runs(recipe, tmp_path_factory.mktemp("killed"), OTHERS)


@pytest.mark.parametrize("moment", QUICK)
def test_killed(killed: Path, uninterrupted: Path, recipe: Callable, moment: str) -> None:
    """Resumed to the end, it has the steps, figures and state of the run that was never disturbed, and no litter."""
    resume_and_compare(killed / moment, uninterrupted, recipe, moment)


@pytest.mark.slow
@pytest.mark.parametrize("moment", OTHERS)
def test_killed_at_other_moments(killed_more: Path, uninterrupted: Path, recipe: Callable, moment: str) -> None:
    """The same."""
    resume_and_compare(killed_more / moment, uninterrupted, recipe, moment)


def resume_and_compare(run: Path, uninterrupted: Path, recipe: Callable, moment: str) -> None:
    """What the kill left, and what a resumed run makes of it."""
    assert status(run)["state"] == "running"
    assert complete_steps(run) == MOMENTS[moment][1]
    assert train(recipe(run), *WORDS) == 0
    assert metrics(run) == metrics(uninterrupted)
    assert bits(run, LAST) == bits(uninterrupted, LAST)
    assert complete_steps(run) == [LAST]


def test_a_run_with_damaged_checkpoints(settings: dict, uninterrupted: Path, capsys: pytest.CaptureFixture) -> None:
    """It names them, begins from the one before, and ends as if they had been whole; with none left it is refused."""
    run = Path(settings["run"]["dir"])
    assert train(settings, "checkpoint.every=2", "checkpoint.keep=9", "run.steps=6") == 0
    for step, name in ((6, "__0_0.distcp"), (4, ".metadata")):
        path = step_folder(run, step) / name
        path.write_bytes(path.read_bytes()[:-9] + b"damaged..")
    assert train(settings, "checkpoint.every=2", "checkpoint.keep=9") == 0
    errors = capsys.readouterr().err
    assert f"the checkpoint {step_folder(run, 6)} is damaged (__0_0.distcp has changed since it was written)" in errors
    assert f"the checkpoint {step_folder(run, 4)} is damaged (.metadata has changed since it was written)" in errors
    assert "resuming after step 2" in errors
    assert (run / "events.jsonl").read_text().count('"checkpoint_damaged"') == 2
    assert metrics(run) == metrics(uninterrupted)
    assert bits(run, LAST) == bits(uninterrupted, LAST)
    assert complete_steps(run) == [2, 4, 6, 8]
    before = (run / "metrics.jsonl").read_text()
    for step in (2, 4, 6, 8):
        (step_folder(run, step) / "COMPLETE").write_text("nonsense")
    assert refuse(settings).startswith(f"every checkpoint in {run} is damaged: step_00000008 (its COMPLETE is missing")
    assert (run / "metrics.jsonl").read_text() == before
    assert len(list(run.glob("checkpoints/step_*/__0_0.distcp"))) == 4


def test_a_disk_that_is_nearly_full(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warned of before a save when two more like the last one would not fit; the save is made all the same."""
    run = Path(settings["run"]["dir"])
    assert train(settings, "run.steps=2") == 0
    for steps, missing in ((3, 0), (4, 1)):
        files = [path for path in step_folder(run, steps - 1).iterdir() if path.name != "COMPLETE"]
        free = 2 * sum(path.stat().st_size for path in files) - missing
        monkeypatch.setattr(saver.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert train(settings, f"run.steps={steps}") == 0
        assert (run / "events.jsonl").read_text().count('"kind": "disk"') == steps - 3
    assert complete_steps(run) == [3, 4]


def test_a_mistake_after_a_save_was_begun(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends at once by something else: the save in flight is brought to its end."""

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "hf")

    monkeypatch.setattr(Training, "_export", fail)
    with pytest.raises(PermissionError):
        train(settings, "checkpoint.every=2", "export.every=2")
    assert complete_steps(Path(settings["run"]["dir"])) == [2]
