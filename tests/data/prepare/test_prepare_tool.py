"""The command line of prepare_data: its options take effect, and every failure ends with one sentence."""

import errno
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.small_files import decode_documents, read_folder, write_jsonl
from trinity.data.prepare import prepare
from trinity.data.prepare.prepare import prepare_data
from trinity.data.prepare.tokenize import Encoder
from trinity.errors import UserError

TEXTS = [f"Text number {number} " * 5 for number in range(200)]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tokenizer_dir: Path) -> Callable:
    """(out, words) → exit code, stdout, last line of stderr."""

    def run(out: Path, *words: object) -> tuple[int, str, str]:
        arguments = ["prepare_data", "--tokenizer", tokenizer_dir, "--out", out, *words]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(Path(__file__).parents[3] / "tools" / "prepare_data.py"), run_name="__main__")
        output = capsys.readouterr()
        return end.value.code, output.out, (output.err.splitlines() or [""])[-1]

    return run


def test_options(tool: Callable, tmp_path: Path, tokenizer_dir: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ["a", "b", "a"])
    write_jsonl(folder / "dev.jsonl", ["c"], field="body")
    out = tmp_path / "out"
    code, printed, _ = tool(out, "--dataset", folder, "--deduplicate", "--workers", 2)
    assert code == 0
    assert printed == f"{out}: 2 documents, 4 tokens, 2 bytes of text, 1 shards, 1 duplicate skipped\n"
    assert decode_documents(out, tokenizer_dir) == ["a", "b"]
    files = [f"{folder}/*.jsonl", "--skip-bad-lines", "--shard-tokens", 2, "--workers", 0]
    code, printed, _ = tool(tmp_path / "files", "--input", *files)
    assert printed.endswith(": 3 documents, 6 tokens, 3 bytes of text, 3 shards, 1 unreadable skipped\n")
    assert tool(tmp_path / "field", "--input", folder / "dev.jsonl", "--field", "body")[1].count("1 documents") == 1
    code, _, error = tool(tmp_path / "none", "--input", folder, "--split", "dev")
    assert code == 2
    assert error.endswith("error: --config and --split say which part of a --dataset to read; --input has none")
    assert tool(tmp_path / "none", "--input", folder, "--dataset", folder)[0] == 2
    assert tool(tmp_path / "none")[0] == 2


def test_interrupted_at_a_terminal(fresh_command: Callable, tmp_path: Path, tokenizer_dir: Path) -> None:
    """Ctrl-C reaches the main process and the workers: one line, no traceback, and the same command resumes."""
    path, out = (
        write_jsonl(tmp_path / "a.jsonl", [f"{number} " + text for text in TEXTS for number in range(80)]),
        tmp_path,
    )
    words = ["--input", path, "--tokenizer", tokenizer_dir, "--out", out / "out", "--shard-tokens", 30_000]
    process = fresh_command("tools/prepare_data.py", *words, "--workers", 2, start_new_session=True)
    progress = out / "out" / "progress.json"
    while process.poll() is None and not (progress.exists() and json.loads(progress.read_text())["shards"]):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output) == (130, "")
    assert errors.splitlines()[-1] == "stopped; run the same command again to continue"
    assert "Traceback" not in errors
    assert not (out / "out" / "index.json").exists()
    prepare_data([path], tokenizer_dir, out / "out", shard_tokens=30_000)
    prepare_data([path], tokenizer_dir, out / "whole", shard_tokens=30_000)
    assert read_folder(out / "out") == read_folder(out / "whole")


def test_a_killed_worker_costs_one_shard(
    tool: Callable, tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out"
    real = Encoder.__call__

    def killed(self: Encoder, batches: list) -> object:
        if batches[0].position.item > 100:
            deadline = time.monotonic() + 30
            while not shards_done() and time.monotonic() < deadline:  # the other worker may be slower
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, batches)

    def shards_done() -> int:
        progress = out / "progress.json"
        return len(json.loads(progress.read_text())["shards"]) if progress.exists() else 0

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "__call__", killed)
        patch.setattr(prepare, "BATCH_BYTES", 2000)
        patch.setattr("trinity.data.sources.documents.BATCH_BYTES", 2000)
        code, _, error = tool(out, "--input", path, "--shard-tokens", 700, "--workers", 2)
    assert code == 1
    assert error.startswith("error: a worker process was killed by signal 9, perhaps for want of memory; run the same")
    finished = shards_done()
    assert finished > 0
    kept = [(out / f"shard_{number:05d}.tokens").stat().st_ino for number in range(finished)]
    assert tool(out, "--input", path, "--shard-tokens", 700)[0] == 0
    assert [(out / f"shard_{number:05d}.tokens").stat().st_ino for number in range(finished)] == kept
    assert decode_documents(out, tokenizer_dir) == TEXTS


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_out_that_cannot_be_created(tool: Callable, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)

    def refuse(self: Path, *arguments: object, **options: object) -> None:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    out = tmp_path / "out"
    sentence = f"error: --out {out} cannot be made ({os.strerror(code)}); give a folder that can be written"
    assert tool(out, "--input", path, "--workers", 0) == (2, "", sentence)


def test_an_out_that_cannot_be_written(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished folder is not written to."""
    path, out = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out"
    prepare_data([path], tokenizer_dir, out)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert prepare_data([path], tokenizer_dir, out)[1]
    (out / "shard_00000.tokens").unlink()
    with pytest.raises(UserError, match=f"--out {out} cannot be written; check its permissions"):
        prepare_data([path], tokenizer_dir, out)


def test_an_input_missing_or_changed_after_a_kill(tmp_path: Path, tokenizer_dir: Path) -> None:
    path, out = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out"
    prepare_data([path], tokenizer_dir, out, shard_tokens=700)
    (out / "index.json").rename(out / "progress.json")
    (out / "shard_00002.tokens").unlink()
    before = read_folder(out)
    write_jsonl(path, TEXTS[:-1])
    with pytest.raises(UserError, match="whose inputs differ from this command's"):
        prepare_data([path], tokenizer_dir, out, shard_tokens=700)
    path.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl does not exist"):
        prepare_data([path], tokenizer_dir, out, shard_tokens=700)
    assert read_folder(out) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("kind", ["tokens", "documents", "hashes"])
def test_a_full_disk_with_workers(tool: Callable, tmp_path: Path, tokenizer_dir: Path, kind: str) -> None:
    path, out = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out"
    words = ["--input", path, "--shard-tokens", 700, "--workers", 2, "--deduplicate"]
    assert tool(tmp_path / "whole", *words)[0] == 0
    out.mkdir()
    full = out / f"shard_00001.{kind}.tmp"
    full.symlink_to("/dev/full")
    code, _, error = tool(out, *words)
    assert (code, error) == (1, "error: the disk is full; free some space and run the same command again")
    full.unlink()
    first = (out / "shard_00000.tokens").stat().st_ino
    assert tool(out, *words)[0] == 0
    assert (out / "shard_00000.tokens").stat().st_ino == first
    assert read_folder(out) == read_folder(tmp_path / "whole")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--chat", "--turns", "split", "--loss", "all"], "--loss all would train them again; use one of the two"),
        (["--chat", "--too-long", "drop"], "--too-long drop has no length; add --max-tokens, as data.sequence_length"),
        (["--chat", "--max-tokens", 1], "--max-tokens 1 must be at least 2, BOS and a token to train"),
        (["--loss", "all"], "error: --loss is about conversations; add --chat"),
    ],
)
def test_options_of_chat(tool: Callable, tmp_path: Path, words: list, sentence: str) -> None:
    code, _, error = tool(tmp_path / "out", "--input", "x.jsonl", *words)
    assert code == 2
    assert error.endswith(sentence)


def test_chat(tool: Callable, tmp_path: Path) -> None:
    """A pair of texts needs no template; the line says how much is trained."""
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "completion": " b"}\n')
    code, printed, _ = tool(tmp_path / "out", "--input", tmp_path / "x.jsonl", "--chat", "--template", "tokenizer")
    assert code == 0
    assert printed == f"{tmp_path / 'out'}: 1 documents, 4 tokens (2 trained), 3 bytes of text, 1 shards\n"
