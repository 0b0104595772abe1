"""Exact duplicates: the table against a set, and what prepare_data leaves out."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.small_files import decode_documents, read_folder, write_jsonl
from trinity.data.prepare.dedup import SeenHashes
from trinity.data.prepare.prepare import prepare_data
from trinity.data.prepare.tokenize import hashes_of
from trinity.data.sources.shards import TokenSource
from trinity.errors import UserError

TEXTS = ["one", "two", "one", "", "three", "two ", "one", "three", "four"]
KEPT = ["one", "two", "three", "two ", "four"]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 40), max_size=30), max_size=8), st.integers(0, 3))
def test_the_table_equals_a_set(batches: list[list[int]], collisions: int) -> None:
    """Few numbers, so that many are equal; first halves cut to a few, so that many slots are the same."""
    table, reference = SeenHashes(), set()
    for batch in batches:
        hashes = hashes_of(str(number).encode() for number in batch)
        hashes = hashes if collisions == 0 else np.column_stack([hashes[:, 0] % np.uint64(collisions), hashes[:, 1]])
        expected = []
        for row in map(tuple, hashes.tolist()):
            expected.append(row not in reference)
            reference.add(row)
        assert table.add(hashes).tolist() == expected
    assert table.count == len(reference)


def test_the_table_grows() -> None:
    """From 1024 slots on: every hash is found again, and the table is at most 16 bytes / 0.7 · 1.5 a hash."""
    table = SeenHashes()
    hashes = np.random.default_rng(0).integers(1, 2**63, (100_000, 2)).astype(np.uint64)
    for new in (True, False):
        for start in range(0, len(hashes), 777):
            assert (table.add(hashes[start : start + 777]) == new).all()
    assert table._table.nbytes <= 16 * 1.5 / 0.7 * len(hashes) * 1.01


def test_the_first_of_equal_texts_stays(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Over two files and several shards; without the option all texts stay."""
    inputs = [write_jsonl(tmp_path / "a.jsonl", TEXTS[:4]), write_jsonl(tmp_path / "b.jsonl", TEXTS[4:])]
    index, _ = prepare_data(inputs, tokenizer_dir, tmp_path / "out", shard_tokens=5, deduplicate=True)
    assert decode_documents(tmp_path / "out", tokenizer_dir) == KEPT
    assert index["skipped"] == {"duplicate": 3, "empty": 1}
    assert (index["documents"], index["deduplicate"], index["input_documents"]) == (5, True, [2, 3])
    sizes = [(tmp_path / "out" / f"shard_{n:05d}.hashes").stat().st_size for n in range(len(index["shards"]))]
    assert sizes == [16 * entry["documents"] for entry in index["shards"]]
    index, _ = prepare_data(inputs, tokenizer_dir, tmp_path / "all", shard_tokens=5)
    assert (index["documents"], index["deduplicate"]) == (8, False)


def test_repair_keeps_the_hashes_of_earlier_shards(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Damaged hashes are rebuilt with their shard; a reader does not need them."""
    inputs, out = [write_jsonl(tmp_path / "a.jsonl", TEXTS * 3)], tmp_path / "out"
    prepare_data(inputs, tokenizer_dir, out, shard_tokens=5, deduplicate=True)
    whole = read_folder(out)
    for name in ("shard_00001.hashes", "shard_00002.tokens"):
        (out / name).write_bytes(b"")
        if name.endswith("hashes"):
            assert TokenSource(out).documents == 5
        assert prepare_data(inputs, tokenizer_dir, out, shard_tokens=5, deduplicate=True)[1] is False
        assert read_folder(out) == whole


def test_shards_with_and_without_the_option_do_not_mix(tmp_path: Path, tokenizer_dir: Path) -> None:
    """A folder from before the option existed counts as one without it."""
    inputs = [write_jsonl(tmp_path / "a.jsonl", TEXTS)]
    for before, after in ((False, True), (True, False)):
        out = tmp_path / f"out{before}"
        prepare_data(inputs, tokenizer_dir, out, deduplicate=before)
        with pytest.raises(UserError, match="shards whose deduplicate differ"):
            prepare_data(inputs, tokenizer_dir, out, deduplicate=after)
    old = shutil.copytree(tmp_path / "outFalse", tmp_path / "old")
    index = json.loads((old / "index.json").read_text())
    del index["deduplicate"]
    (old / "index.json").write_text(json.dumps(index))
    assert prepare_data(inputs, tokenizer_dir, old) == (index, True)
