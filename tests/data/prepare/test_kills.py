"""A preparation that is killed by SIGKILL at random moments, with its workers, leaves the bytes of one that was not."""

import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.small_files import read_folder, write_jsonl
from trinity.data.prepare import prepare
from trinity.data.prepare.prepare import prepare_data
from trinity.data.sources import documents
from trinity.data.sources.shards import TokenSource

FORK = multiprocessing.get_context("fork")
KILLS = 12


@pytest.fixture
def inputs(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """1000 documents, a quarter of them copies of others, some empty or unreadable, in two files; small batches."""
    monkeypatch.setattr(documents, "BATCH_BYTES", 2000)
    monkeypatch.setattr(prepare, "BATCH_BYTES", 2000)
    numbers = random.Random(5)
    lines = "".join(texts).splitlines()
    contents: list[str] = []
    for _ in range(1000):
        start = numbers.randrange(len(lines) - 12)
        copied = contents and numbers.random() < 0.25
        contents.append(numbers.choice(contents) if copied else "\n".join(lines[start : start + numbers.randrange(12)]))
    paths = [write_jsonl(tmp_path / "a.jsonl", contents[:350]), write_jsonl(tmp_path / "b.jsonl", contents[350:])]
    for path in paths:
        path.write_bytes(path.read_bytes() + b"{oops\n")
    return paths


def start(inputs: list[Path], tokenizer: Path, out: Path, workers: int, deduplicate: bool) -> FORK.Process:
    """prepare_data in a separate process."""

    def run() -> None:
        # A group of its own: its workers must end without anybody's help.
        os.setpgrp()
        prepare_data(
            inputs,
            tokenizer,
            out,
            shard_tokens=1500,
            skip_bad_lines=True,
            deduplicate=deduplicate,
            workers=workers,
        )

    process = FORK.Process(target=run)
    process.start()
    return process


@pytest.mark.parametrize(("deduplicate", "workers"), [(False, [2]), (True, [2]), (True, [0, 1, 2, 3])])
def test_killed_until_done(
    inputs: list[Path], tokenizer_dir: Path, tmp_path: Path, deduplicate: bool, workers: list[int]
) -> None:
    """Each start has the next number of workers; a finished shard is not written again.

    On a busy machine every kill at a random moment may come too early or too late; kills after progress always bite.
    """
    began = time.monotonic()
    whole = start(inputs, tokenizer_dir, tmp_path / "whole", 2, deduplicate)
    whole.join()
    longest = (time.monotonic() - began) / 6
    assert whole.exitcode == 0
    out, numbers, kept = tmp_path / "out", random.Random(7), {}
    for kill in range(KILLS):
        process = start(inputs, tokenizer_dir, out, workers[kill % len(workers)], deduplicate)
        shards_before = len(finished_files(out))
        while kill % 2 and process.is_alive() and len(finished_files(out)) == shards_before:
            time.sleep(0.001)  # every other start is left until it has finished a shard more
        process.join(numbers.uniform(0, longest))
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kept |= {name: (out / name).stat().st_ino for name in finished_files(out)}
    assert kill >= 1
    assert kept
    last = start(inputs, tokenizer_dir, out, 2, deduplicate)
    last.join()
    assert last.exitcode == 0
    assert read_folder(out) == read_folder(tmp_path / "whole")
    assert {name: (out / name).stat().st_ino for name in kept} == kept
    assert len(TokenSource(out)._shards) > 10


def finished_files(out: Path) -> list[str]:
    """Files of the finished shards in progress.json."""
    if not (out / "progress.json").exists():
        return []
    shards = json.loads((out / "progress.json").read_text())["shards"]
    return [f"shard_{number:05d}.{kind}" for number in range(len(shards)) for kind in ("tokens", "documents")]


@pytest.mark.parametrize("deduplicate", [False, True])
def test_any_number_of_workers_gives_the_same(
    inputs: list[Path], tokenizer_dir: Path, tmp_path: Path, deduplicate: bool
) -> None:
    for workers in (0, 1, 3):
        process = start(inputs, tokenizer_dir, tmp_path / f"{workers}", workers, deduplicate)
        process.join()
        assert process.exitcode == 0
    assert read_folder(tmp_path / "0") == read_folder(tmp_path / "1") == read_folder(tmp_path / "3")
    index = json.loads((tmp_path / "0" / "index.json").read_text())
    assert index["skipped"]["unreadable"] == 2
    assert (index["skipped"].get("duplicate", 0) > 50) == deduplicate


def test_two_preparations_of_one_folder_are_refused(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: list[Path], capfd: Callable
) -> None:
    monkeypatch.setattr(prepare, "LOCK_SECONDS", 0.1)
    out = tmp_path / "out"
    out.mkdir()
    with prepare.file_lock(out):
        second = start(inputs, tokenizer_dir, out, 0, False)
        second.join()
    assert second.exitcode == 1
    assert f"--out {out} is being written by another process" in capfd.readouterr().err
    assert read_folder(out) == {}
