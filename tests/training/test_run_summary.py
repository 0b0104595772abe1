"""The messages at the end of a run, and its next commands, which work as printed."""

import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from trinity.config.load import load_config
from trinity.config.run import RunConfig
from trinity.training.run_summary import closing, next_commands

ROOT = Path(__file__).parents[2]


def record(step: int, **fields: object) -> dict:
    """The record of a step, with further fields."""
    return {"step": step, "loss": 10 - step, "grad_norm": 1.5, "skipped": False} | fields


@pytest.fixture
def finished(uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunConfig, Path]:
    """A finished run and its config, seen from the project's folder."""
    monkeypatch.chdir(ROOT)
    path = tmp_path / "a run"  # which a shell would take for two words
    shutil.copytree(uninterrupted, path)
    return load_config(path / "config.yaml"), path


def test_closing(finished: tuple[RunConfig, Path]) -> None:
    """Loss, time, locations of files; the only next command of a stopped run is the same command."""
    config, path = finished
    saved = path / "checkpoints" / "step_00000008"
    text = closing(config, path, saved, record(8, **{"validation_loss.x": 2.5}), 8, 8, 3725)
    assert text.splitlines()[:3] == [
        "finished: 8 steps in 1:02:05, loss 2.0000, loss.x 2.5000",
        f"  run         {path}",
        f"  checkpoint  {saved}",
    ]
    (path / "hf" / "step_00000004").mkdir(parents=True)
    (path / "hf" / "step_00000004" / "config.json").write_text("{}")
    assert closing(config, path, saved, record(5), 5, 8, 9, "SIGINT").splitlines() == [
        "saved at step 5 of 8 in 0:00:09, loss 5.0000, stopped by SIGINT; the same command resumes",
        f"  run         {path}",
        f"  checkpoint  {saved}",
        f"  export      {path / 'hf' / 'step_00000004'}",
    ]
    assert closing(config, path, saved, {}, 8, 8, 2).splitlines()[0] == "finished: 8 steps in 0:00:02"


def test_the_next_commands_work_as_printed(
    finished: tuple[RunConfig, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Each exits with 0 and writes what it names; from another folder the paths are absolute."""
    config, path = finished
    commands = [shlex.split(command) for command in next_commands(config, path, 8)]
    assert [words[1] for words in commands] == ["tools/generate.py", "tools/export_hf.py", "tools/report.py"]
    for _, tool, *words in commands:
        monkeypatch.setattr(sys, "argv", [tool, *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(tool, run_name="__main__")
        assert end.value.code == 0, capsys.readouterr().err
    assert (path / "hf" / "step_00000008" / "config.json").is_file()
    assert (path / "report.html").is_file()
    assert len(next_commands(config, path, 8)) == 2  # it is exported now
    config.data.tokenizer = None
    monkeypatch.chdir(path)
    report = shlex.split(*next_commands(config, path, 8))
    assert report[1:] == [str(ROOT / "tools" / "report.py"), str(path)]


def test_a_run_with_a_chat_template_is_chatted_with(finished: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, path = finished
    tokenizer = shutil.copytree(config.data.tokenizer, tmp_path / "tokenizer")
    (tokenizer / "chat_template.jinja").write_text("{{ messages[0].content }}")
    config.data.tokenizer = str(tokenizer)
    assert shlex.split(next_commands(config, path, 8)[0])[1:] == ["tools/generate.py", str(path), "--chat"]
