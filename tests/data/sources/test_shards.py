"""Shards: reading returns the written documents, and files that were changed are refused by name."""

import json
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trinity.data.sources import shards
from trinity.data.sources.shards import TokenSource
from trinity.errors import UserError


@pytest.mark.parametrize(("vocab_size", "dtype"), [(100, "<u2"), (65536, "<u2"), (65537, "<u4")])
@pytest.mark.parametrize("shard_tokens", [1, 64, 10_000])
def test_round_trip(
    make_source: Callable, random_documents: Callable, vocab_size: int, dtype: str, shard_tokens: int
) -> None:
    documents = random_documents(60, 50, 1)
    documents[7] = [0, vocab_size - 1]
    source = make_source("s", documents, shard_tokens, vocab_size=vocab_size)
    assert (source.documents, source.tokens) == (60, sum(map(len, documents)))
    assert source.text_bytes == 3 * source.tokens
    for number, ids in enumerate(documents):
        assert source.length(number) == len(ids)
        assert source.read(number, 0, len(ids)).tolist() == ids
        assert source.read(number, 1, len(ids) - 1).tolist() == ids[1:]
        assert source.read(number, 0, len(ids)).dtype == np.dtype(dtype)
    flat = [token for ids in documents for token in ids]
    for size in (7, 100_000):
        assert np.concatenate(list(source.chunks(size))).tolist() == flat


def test_shards_are_full_and_long_documents_alone(make_source: Callable) -> None:
    """Lengths 40, 60 fill a shard of 100; 1 begins the next; 250 has its own; 99 and 1 share the last."""
    lengths = [40, 60, 1, 250, 99, 1]
    source = make_source("s", [[0] + [5] * (length - 1) for length in lengths], 100)
    index = json.loads((source.directory / "index.json").read_text())
    assert [entry["tokens"] for entry in index["shards"]] == [100, 1, 250, 100]
    assert [entry["documents"] for entry in index["shards"]] == [2, 1, 1, 2]
    assert [entry["document_lengths"] for entry in index["shards"]] == [
        [0, 0, 0, 0, 0, 2],
        [1],
        [0, 0, 0, 0, 0, 0, 0, 1],
        [1, 0, 0, 0, 0, 0, 1],
    ]
    raw = np.fromfile(source.directory / "shard_00003.documents", "<i8")
    assert raw.tolist() == [0, 99, 100]


def test_no_file_stays_open(make_source: Callable, random_documents: Callable) -> None:
    """A process has few descriptors (1024 by default) and a corpus may have more shards."""
    documents = random_documents(100, 20, 2)
    source = make_source("s", documents, 1)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 20, hard))
    try:
        assert [source.read(number, 0, len(ids)).tolist() for number, ids in enumerate(documents)] == documents
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_views_cannot_be_written(make_source: Callable) -> None:
    view = make_source("s", [[0, 1, 2]]).read(0, 0, 3)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def test_reading_past_a_document_fails(make_source: Callable) -> None:
    source = make_source("s", [[0, 1, 2], [0, 3]])
    for document, start, length in [(0, 2, 2), (0, -1, 1), (2, 0, 1), (-1, 0, 1)]:
        with pytest.raises(AssertionError):
            source.read(document, start, length)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("kind", ["tokens", "documents"])
@pytest.mark.parametrize(
    ("harm", "words"),
    [(_cut, "is cut short"), (_lengthen, "is too long"), (_flip, "has changed"), (Path.unlink, "is missing")],
)
def test_damage_is_named(
    make_source: Callable, random_documents: Callable, kind: str, harm: Callable, words: str
) -> None:
    source = make_source("s", random_documents(30, 50, 3))
    path = source.directory / f"shard_00002.{kind}"
    harm(path)
    with pytest.raises(UserError, match=re.escape(f"{path} {words}") + r".* run tools/prepare_data\.py again"):
        TokenSource(source.directory)


def test_when_checksums_are_checked(
    make_source: Callable, random_documents: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_source("s", random_documents(30, 50, 3)).directory
    _flip(directory / "shard_00001.tokens")
    TokenSource(directory, "never")
    monkeypatch.setattr(shards, "AUTO_VERIFY_BYTES", 100)
    TokenSource(directory, "auto")
    with pytest.raises(UserError, match="has changed"):
        TokenSource(directory, "always")


def test_folders_without_an_index(make_source: Callable, tmp_path: Path) -> None:
    source = make_source("s", [[0, 1]])
    with pytest.raises(UserError, match=r"holds no index\.json"):
        TokenSource(tmp_path / "nowhere")
    index = source.directory / "index.json"
    content = index.read_text()
    index.write_text(content[:50])
    with pytest.raises(UserError, match="is not JSON"):
        TokenSource(source.directory)
    index.write_text(content.replace('"version": 1', '"version": 9'))
    with pytest.raises(UserError, match="shard format 9"):
        TokenSource(source.directory)
    index.rename(source.directory / "progress.json")
    with pytest.raises(UserError, match="is not finished"):
        TokenSource(source.directory)


def test_fingerprint_is_of_the_content(make_source: Callable, random_documents: Callable) -> None:
    documents = random_documents(20, 30, 4)
    first, same = make_source("a", documents), make_source("b", documents)
    other = make_source("c", [*documents[:-1], [0, 98]])
    assert first.fingerprint == same.fingerprint != other.fingerprint
