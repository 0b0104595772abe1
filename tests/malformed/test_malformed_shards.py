"""Malformed shards (index, offsets, tokens) and malformed text files."""

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.malformed.refusals import (
    REFUSED_START,
    refusal,
    replace_by_dangling_link,
    replace_by_folder,
    replace_by_loop,
    train,
)
from trinity.data.prepare.prepare import prepare_data
from trinity.data.sources.shards import TokenSource
from trinity.data.sources.text import TextSource

TOTALS = ["documents", "tokens", "text_bytes"]
READ = ["dtype", "vocab_size", "bos_id", "tokenizer", "shards", *TOTALS]
ENTRY = [*TOTALS, "tokens_bytes", "tokens_checksum", "documents_bytes", "documents_checksum"]
VALUES = [None, [], {}, "word", -1, 1.5, 10**30]


def change_index(shards: Path, change: Callable[[dict], object]) -> None:
    """Rewrite index.json."""
    path = shards / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def refusal_of(shards: Path) -> str:
    """The error message when the folder is opened and read."""

    def read() -> None:
        source = TokenSource(shards)
        source.read(0, 0, source.length(0))

    sentence = refusal(read, shards)
    assert str(shards) in sentence
    return sentence


@pytest.mark.parametrize("key", READ)
def test_a_key_of_the_index(shards: Path, key: str, limited_memory: None) -> None:
    """Missing, of another type, negative, enormous: the message names the key; no claimed size is allocated."""
    whole = (shards / "index.json").read_text()
    change_index(shards, lambda index: index.pop(key))
    assert key in refusal_of(shards)
    for value in VALUES:
        if (key, value) != ("tokenizer", "word"):  # a hash like any other, until it is compared with a tokenizer's
            (shards / "index.json").write_text(whole)
            change_index(shards, lambda index, value=value: index.update({key: value}))
            assert key in refusal_of(shards) or "vocab_size" in refusal_of(shards), value


@pytest.mark.parametrize("key", ENTRY)
def test_a_key_of_an_entry(shards: Path, key: str, limited_memory: None) -> None:
    whole = (shards / "index.json").read_text()
    change_index(shards, lambda index: index["shards"][0].pop(key))
    assert f"index.json is damaged (of shard 0, {key} is None" in refusal_of(shards)
    kind = key.partition("_")[0]
    for value in VALUES:
        (shards / "index.json").write_text(whole)
        change_index(shards, lambda index, value=value: index["shards"][0].update({key: value}))
        # a valid count that differs from the files' shows in their sizes or in the totals
        assert kind in refusal_of(shards), value


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "5", '"x"', "{}", "\0", "NaN", "[" * 10**5, '{"version": 1}', "\ufeff{}"]
)
def test_an_invalid_index(shards: Path, text: str) -> None:
    (shards / "index.json").write_text(text)
    refusal_of(shards)


@pytest.mark.parametrize("entries", [[None], [1], ["a"], [[]], [{}]])
def test_invalid_entries(shards: Path, entries: list) -> None:
    change_index(shards, lambda index: index.update(shards=entries))
    assert "index.json is damaged (of shard 0, " in refusal_of(shards)


@pytest.mark.parametrize("change", [lambda entries: entries * 2, lambda entries: [], lambda entries: entries * 1000])
def test_too_many_or_too_few_entries(shards: Path, change: Callable) -> None:
    change_index(shards, lambda index: index.update(shards=change(index["shards"])))
    assert "documents is " in refusal_of(shards)


@pytest.mark.parametrize("dtype", ["<f4", "<i8", ">u2", "<u4", "u1", "O", "V4", "<u2 ", "../x", ""])
def test_another_dtype(shards: Path, dtype: str) -> None:
    change_index(shards, lambda index: index.update(dtype=dtype))
    assert f"dtype is {dtype!r}, of 400 ids it is <u2" in refusal_of(shards)


@pytest.mark.parametrize(
    ("key", "value"), [("vocab_size", 0), ("vocab_size", 2**33), ("bos_id", 400), ("bos_id", True)]
)
def test_ids_that_do_not_fit(shards: Path, key: str, value: int) -> None:
    change_index(shards, lambda index: index.update({key: value}))
    assert f"{key} is {value}" in refusal_of(shards)


@pytest.mark.parametrize("damage", [replace_by_folder, replace_by_loop, replace_by_dangling_link])
@pytest.mark.parametrize("name", ["index.json", "shard_00000.tokens", "shard_00000.documents"])
def test_a_folder_or_link_in_place_of_a_file(shards: Path, damage: Callable[[Path], None], name: str) -> None:
    damage(shards / name)
    refusal_of(shards)


def update_checksum(shards: Path, kind: str) -> None:
    """Rewrite the checksum of a file in the index, as an attacker could."""
    path = shards / f"shard_00000.{kind}"
    digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    change_index(shards, lambda index: index["shards"][0].update({f"{kind}_checksum": digest}))


OFFSETS = {
    "backwards": lambda o: o[::-1], "an empty document": lambda o: np.r_[o[:2], o[1], o[3:]],
    "not from 0": lambda o: np.r_[5, o[1:]], "below 0": lambda o: np.r_[o[:2], -5, o[3:]],
    "first below 0": lambda o: np.r_[-1, o[1:]], "beyond the end": lambda o: np.r_[o[:-1], 10**12],
    "beyond in the middle": lambda o: np.r_[o[:2], 10**12, o[3:]], "before the end": lambda o: np.r_[o[:-1], o[-1] - 1],
    "the least": lambda o: np.r_[o[:2], np.iinfo(np.int64).min, o[3:]],
}  # fmt: skip


@pytest.mark.parametrize("name", OFFSETS)
def test_wrong_offsets(shards: Path, name: str) -> None:
    """Offsets that do not divide the tokens into documents, in a shard with correct sizes and checksums."""
    path = shards / "shard_00000.documents"
    OFFSETS[name](np.fromfile(path, "<i8")).astype("<i8").tofile(path)
    update_checksum(shards, "documents")
    assert f"{path} does not cut" in refusal_of(shards)


@pytest.mark.parametrize("workers", [0, 1])
def test_in_a_run(settings: dict, corpus: SimpleNamespace, shards: Path, workers: int) -> None:
    """Detected in the training process or in a data worker: the same message, and no step is trained."""
    path, run = shards / "shard_00000.documents", Path(settings["run"]["dir"])
    OFFSETS["backwards"](np.fromfile(path, "<i8")).astype("<i8").tofile(path)
    update_checksum(shards, "documents")
    settings["data"]["train"]["prose"] = str(shards)
    settings["data"]["workers"] = workers
    run.mkdir()
    copy = {"tokenizer", *(f"tokenizer/{path.name}" for path in corpus.tokenizer.iterdir())}
    created = copy | {"config.yaml", "events.jsonl", "metrics.jsonl", "router.jsonl"}
    assert f"{path} does not cut" in refusal(lambda: train(settings), shards, run, may_change=REFUSED_START | created)
    assert (run / "metrics.jsonl").read_text() == ""


def test_another_tokenizers_hash(settings: dict, shards: Path) -> None:
    change_index(shards, lambda index: index.update(tokenizer="word"))
    settings["data"]["train"]["prose"] = str(shards)
    assert "was made with another tokenizer" in refusal(lambda: train(settings), shards)


LINE = b'{"text": "a line"}\n'
LINES = {
    "{": "a.jsonl:2 is not valid JSON", "[1]": "a.jsonl:2 has no field text", "5": "a.jsonl:2 has no field text",
    "null": "a.jsonl:2 has no field text", "{}": "a.jsonl:2 has no field text", '{"txt": "a"}': "(fields: txt)",
    '{"text": 5}': "a.jsonl:2 holds int", '{"text": null}': "a.jsonl:2 holds NoneType", '{"text": ["a"]}': "holds list",
    '{"text": {}}': "a.jsonl:2 holds dict", '{"text": "\\ud800"}': "a.jsonl:2 holds half a surrogate pair",
    "[" * 10**5: "a.jsonl:2 is not valid JSON", f'{{"text": {"9" * 5000}}}': "a.jsonl:2 is not valid JSON",
    "\0": "a.jsonl:2 is not valid JSON", '{"text": NaN}': "a.jsonl:2 holds float",
}  # fmt: skip
TEXTS = {("a.jsonl", LINE + line.encode() + b"\n"): sentence for line, sentence in LINES.items()} | {
    ("a.jsonl", LINE + b'{"text": "\xff"}\n'): "a.jsonl is not valid UTF-8 at byte 29",
    ("a.jsonl", b"\xef\xbb\xbf{\n"): "a.jsonl:1 is not valid JSON", ("a.jsonl", b""): "no document with text",
    ("a.jsonl", b"\n\n"): "no document with text", ("a.jsonl", b'{"text": ""}\n'): "no document with text",
    ("a.txt", b""): "no document with text", ("a.txt", b"abc\xff"): "a.txt is not valid UTF-8 at byte 3",
    ("a.parquet", b""): "a.parquet is not a whole Parquet file", ("a.parquet", b"x" * 100): "is not a whole Parquet",
    ("a.parquet", b"PAR1" * 10): "a.parquet is not a whole Parquet file", ("a.pdf", b"x"): "a.pdf is of a kind",
    ("a.zip", b"x"): "a.zip is of a kind",
}  # fmt: skip
COMPRESSED = {
    ("a.jsonl.gz", b"hello"): "not a whole gzip file", ("a.jsonl.gz", b""): "no document with text",
    ("a.jsonl.gz", gzip.compress(LINE * 1000)[:-9]): "not a whole gzip file",
    ("a.jsonl.gz", gzip.compress(LINE) + b"more"): "not a whole gzip file",
    ("a.jsonl.gz", gzip.compress(b"{\n")): "a.jsonl.gz:1 is not valid JSON",
    ("a.jsonl.zst", b"hello"): "not a whole zstd file",
    ("a.jsonl.zst", pa.compress(LINE * 1000, codec="zstd", asbytes=True)[:-3]): "not a whole zstd file",
}  # fmt: skip
BAD_UTF8 = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"], pa.binary()).buffers())
TABLES = {
    "another column": ({"x": ["a"]}, "a.parquet has no column text"), "no column": ({}, "a.parquet has no column text"),
    "numbers": ({"text": [1]}, "a.parquet:1 holds int"), "nothing": ({"text": [None]}, "a.parquet:1 holds NoneType"),
    "lists": ({"text": [["a"]]}, "a.parquet:1 holds list"), "maps": ({"text": [{"a": 1}]}, "a.parquet:1 holds dict"),
    "no rows": ({"text": pa.array([], pa.string())}, "no document with text"),
    "no UTF-8": ({"text": BAD_UTF8}, "a.parquet:1 holds bytes"),
}  # fmt: skip


def check_refused_as_source_and_input(path: Path, tokenizer: Path, sentence: str) -> None:
    """Check that a text file is refused as a source of a run and as input of prepare_data; neither changes the file."""
    parent = path.parent.parent
    message = refusal(lambda: TextSource([path], tokenizer, cache=parent / "cache"), path.parent)
    assert sentence in message
    assert str(path) in message
    message = refusal(lambda: prepare_data([path], tokenizer, parent / "out"), path.parent)
    assert sentence in message
    assert str(path) in message


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder for text files alone."""
    (tmp_path / "texts").mkdir()
    return tmp_path / "texts"


@pytest.mark.parametrize("case", [*TEXTS, *COMPRESSED], ids=range(len(TEXTS) + len(COMPRESSED)))
def test_an_unreadable_text(corpus: SimpleNamespace, texts: Path, case: tuple[str, bytes]) -> None:
    name, content = case
    (texts / name).write_bytes(content)
    check_refused_as_source_and_input(texts / name, corpus.tokenizer, (TEXTS | COMPRESSED)[case])


@pytest.mark.parametrize("name", TABLES)
def test_a_table_without_text(corpus: SimpleNamespace, texts: Path, name: str) -> None:
    columns, sentence = TABLES[name]
    pq.write_table(pa.table(columns), texts / "a.parquet")
    check_refused_as_source_and_input(texts / "a.parquet", corpus.tokenizer, sentence)


@pytest.mark.parametrize("text", ["", "{}", "[]", "\0", '{"model": {"type": "x"}}', '{"version": "1.0"}', "[" * 10**5])
def test_an_invalid_tokenizer(corpus: SimpleNamespace, texts: Path, text: str) -> None:
    (texts / "a.jsonl").write_bytes(LINE)
    (texts / "tokenizer.json").write_text(text)
    message = refusal(lambda: prepare_data([texts / "a.jsonl"], texts, texts.parent / "out"), texts)
    assert f"{texts / 'tokenizer.json'} cannot be read as a tokenizer" in message
    shutil.copy(corpus.tokenizer / "tokenizer.json", texts)
    prepare_data([texts / "a.jsonl"], texts, texts.parent / "out")
