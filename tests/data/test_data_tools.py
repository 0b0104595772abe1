"""The command lines: exit codes, one sentence on stderr, and the same command twice."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trinity.data.corpus import write_corpus
from trinity.data.files import temporary
from trinity.data.shards import TokenSource
from trinity.data.tokenizer import load_tokenizer

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """(name, arguments) → exit code, stdout, stderr of a tool, run in this process."""

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
        output = capsys.readouterr()
        return end.value.code, output.out, output.err

    return run


def process(name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOLS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def sentences(stderr: str) -> list[str]:
    """The lines of stderr that are no progress bar."""
    return [line for line in stderr.replace("\r", "\n").splitlines() if line and "B/s" not in line]


def lines(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"text": f"text number {number} " * 9}) + "\n" for number in range(count)))
    return path


def test_a_mistake_is_one_sentence_and_code_2(tmp_path: Path, tokenizer_dir: Path) -> None:
    ended = process(
        "prepare_data", "--input", tmp_path / "no.txt", "--tokenizer", tokenizer_dir, "--out", tmp_path / "out"
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"error: --input {tmp_path / 'no.txt'} does not exist; check the path\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_code_1_and_costs_one_shard(tool: Callable, tmp_path: Path, tokenizer_dir: Path) -> None:
    """The second shard goes to a device without room; the first stays, and the same command goes on after it."""
    out, source = tmp_path / "out", lines(tmp_path / "a.jsonl", 300)
    arguments = ["--input", source, "--tokenizer", tokenizer_dir, "--shard-tokens", 9000, "--out"]
    assert tool("prepare_data", *arguments, tmp_path / "whole")[0] == 0
    out.mkdir()
    full = temporary(out / "shard_00001.tokens")
    full.symlink_to("/dev/full")
    ended = process("prepare_data", *arguments, out)
    assert ended.returncode == 1
    assert sentences(ended.stderr) == ["error: the disk is full; free some space and run the same command again"]
    full.unlink()
    first = (out / "shard_00000.tokens").stat().st_ino
    assert tool("prepare_data", *arguments, out)[0] == 0
    assert (out / "shard_00000.tokens").stat().st_ino == first
    content = {path.name: path.read_bytes() for path in out.iterdir()}
    assert content == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}


def test_prepare_data_twice(tool: Callable, tmp_path: Path, tokenizer_dir: Path) -> None:
    source, out = lines(tmp_path / "a.jsonl", 40), tmp_path / "out"
    arguments = ["--input", source, "--tokenizer", tokenizer_dir, "--out", out]
    code, printed, shown = tool("prepare_data", *arguments)
    assert code == 0
    assert printed.startswith(f"{out}: 40 documents, {TokenSource(out).tokens:,} tokens, ")
    assert "tokens/s" in shown
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert tool("prepare_data", *arguments) == (0, printed.replace(f"{out}:", f"{out} was already done:"), "")
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_train_tokenizer_twice(tool: Callable, tmp_path: Path) -> None:
    source, out = lines(tmp_path / "a.jsonl", 40), tmp_path / "out"
    arguments = ["--input", source, "--out", out, "--vocab-size"]
    assert tool("train_tokenizer", *arguments, 270)[:2] == (0, f"{out}: 270 ids\n")
    assert load_tokenizer(out).get_vocab_size() == 270
    made = (out / "tokenizer.json").stat().st_mtime_ns
    assert tool("train_tokenizer", *arguments, 270) == (0, f"{out}: 270 ids, already there\n", "")
    assert (out / "tokenizer.json").stat().st_mtime_ns == made
    code, _, error = tool("train_tokenizer", *arguments, 271)
    assert code == 2
    assert error == f"error: --out {out} holds something else already; give a new folder, or --force to write over it\n"
    assert tool("train_tokenizer", *arguments, 271, "--force")[0] == 0
    assert load_tokenizer(out).get_vocab_size() == 271


def test_train_tokenizer_on_part_of_the_text(tool: Callable, tmp_path: Path) -> None:
    """What comes after the limit is not seen, not even that it is broken."""
    source = lines(tmp_path / "a.jsonl", 40)
    with open(source, "a") as file:
        file.write("not json\n")
    arguments = ["train_tokenizer", "--input", source, "--vocab-size", 270, "--out"]
    code, _, error = tool(*arguments, tmp_path / "all")
    assert code == 2
    assert sentences(error)[-1].startswith(f"error: {source}:41 is not valid JSON")
    assert tool(*arguments, tmp_path / "part", "--bytes-limit", 2000)[0] == 0


def test_prepare_corpus(tool: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a library of two modules: this Python's own takes seconds."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "a.py").write_text("a = 1\n")
    (library / "b.py").write_text("b = 1\n")
    monkeypatch.setattr("trinity.data.corpus.write_corpus", lambda out: write_corpus(out, library))
    code, printed, error = tool("prepare_corpus", "--out", tmp_path / "out")
    assert (code, error) == (0, "")
    rows = [row.split() for row in printed.splitlines()]
    assert [row[0] for row in rows] == [
        "file", "code.train.jsonl", "code.validation.jsonl", "prose.train.jsonl", "prose.validation.jsonl"
    ]  # fmt: skip
    assert int(rows[1][1]) + int(rows[2][1]) == 2
    sizes = [int(row[2].replace(",", "")) for row in rows[1:]]
    assert sizes == [(tmp_path / "out" / row[0]).stat().st_size for row in rows[1:]]
