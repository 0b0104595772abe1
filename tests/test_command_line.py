"""Paths on the command line: ~ is expanded by every program, also where a shell does not expand it."""

import argparse
import os
import pwd
import re
import runpy
import sys
from pathlib import Path

import pytest

from trinity.command_line import file_to_write, local_path, path_or_url

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(path for folder in ("tools", "launch") for path in (ROOT / folder).rglob("*.py"))


def test_home_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only at the beginning; URLs and other paths are unchanged."""
    monkeypatch.setenv("HOME", "/home/somebody")
    assert local_path("~/a/~b") == Path("/home/somebody/a/~b")
    assert path_or_url("~/x/**/*.txt") == "/home/somebody/x/**/*.txt"
    assert path_or_url("~") == "/home/somebody"
    user = pwd.getpwuid(os.getuid())
    assert path_or_url(f"~{user.pw_name}/a") == f"{user.pw_dir}/a"
    for text in ("a/~/b", "./~", "s3://bucket/~/a", "/x"):
        assert path_or_url(text) == text
        assert str(local_path("b/~")) == "b/~"
    with pytest.raises(argparse.ArgumentTypeError, match=r"~no-such-user is not a user's home .* write \./~no-such"):
        local_path("~no-such-user/a")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_every_program_expands_home_folders(program: Path) -> None:
    assert "type=Path" not in program.read_text()


def test_a_tool_writes_into_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """--input, --tokenizer and --out of train_tokenizer.py and prepare_data.py."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    (home / "a.txt").write_text("some words and some more words " * 20)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    words = {
        "train_tokenizer": ["--input", "~/a.txt", "--vocab-size", "262", "--out=~/tokenizer"],
        "prepare_data": ["--input", "~/*.txt", "--tokenizer=~/tokenizer", "--out=~/shards", "--workers", "0"],
    }
    for tool, arguments in words.items():
        monkeypatch.setattr(sys, "argv", [tool, *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
        assert end.value.code == 0
    assert sorted(path.name for path in home.iterdir()) == ["a.txt", "shards", "tokenizer"]
    assert not list(here.iterdir())


@pytest.mark.parametrize("tool", ["merge.py RECIPE OUT", "search_merge.py FILE OUT", "average.py RUN OUT --steps 1:2",
                                  "spectrum.py FOLDER"])  # fmt: skip
def test_a_tool_of_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tool: str) -> None:
    """Refused under torchrun with several processes, before it reads anything."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(sys, "argv", tool.split())
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / tool.split()[0]), run_name="__main__")
    assert ended.value.code == 2
    name = f"tools/{tool.split()[0]}"
    assert (
        capsys.readouterr().err == f"error: {name} runs in one process; start it by python {name}, without torchrun\n"
    )


def test_a_file_to_write(tmp_path: Path) -> None:
    """A file, new or old, in a folder that exists; otherwise the name of what is wrong."""
    (tmp_path / "old.json").write_text("{}")
    for name in ("old.json", "new.json"):
        assert file_to_write(str(tmp_path / name)) == tmp_path / name
    for text, message in (
        ("", "the name of the file is empty; write one"), (str(tmp_path), f"{tmp_path} is a folder; name a file, as"),
        (str(tmp_path / "no" / "x.json"), f"the folder {tmp_path / 'no'} does not exist; make it"),
    ):  # fmt: skip
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(message)):
            file_to_write(text)
