"""Shards whose index, offsets or tokens lie, and texts that are none."""

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

from tests.malformed.refusals import REFUSED_START, become_dangling, become_folder, become_loop, refusal, train
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


def opened(shards: Path) -> str:
    """The sentence with which the folder is refused when it is opened, or read from."""

    def read() -> None:
        source = TokenSource(shards)
        source.read(0, 0, source.length(0))

    sentence = refusal(read, shards)
    assert str(shards) in sentence
    return sentence


@pytest.mark.parametrize("key", READ)
def test_a_key_of_the_index(shards: Path, key: str, little_memory: None) -> None:
    """Missing, of another type, negative, enormous: named; nothing that is only claimed takes memory."""
    whole = (shards / "index.json").read_text()
    change_index(shards, lambda index: index.pop(key))
    assert key in opened(shards)
    for value in VALUES:
        if (key, value) != ("tokenizer", "word"):  # a hash like any other, until it is compared with a tokenizer's
            (shards / "index.json").write_text(whole)
            change_index(shards, lambda index, value=value: index.update({key: value}))
            assert key in opened(shards) or "vocab_size" in opened(shards), value


@pytest.mark.parametrize("key", ENTRY)
def test_a_key_of_an_entry(shards: Path, key: str, little_memory: None) -> None:
    whole = (shards / "index.json").read_text()
    change_index(shards, lambda index: index["shards"][0].pop(key))
    assert f"index.json is damaged (of shard 0, {key} is None" in opened(shards)
    kind = key.partition("_")[0]
    for value in VALUES:
        (shards / "index.json").write_text(whole)
        change_index(shards, lambda index, value=value: index["shards"][0].update({key: value}))
        # a count that is one, but another than the files', shows in their sizes or the totals
        assert kind in opened(shards), value


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "5", '"x"', "{}", "\0", "NaN", "[" * 10**5, '{"version": 1}', "\ufeff{}"]
)
def test_an_index_that_is_none(shards: Path, text: str) -> None:
    (shards / "index.json").write_text(text)
    opened(shards)


@pytest.mark.parametrize("entries", [[None], [1], ["a"], [[]], [{}]])
def test_entries_that_are_none(shards: Path, entries: list) -> None:
    change_index(shards, lambda index: index.update(shards=entries))
    assert "index.json is damaged (of shard 0, " in opened(shards)


@pytest.mark.parametrize("change", [lambda entries: entries * 2, lambda entries: [], lambda entries: entries * 1000])
def test_entries_too_many_or_few(shards: Path, change: Callable) -> None:
    change_index(shards, lambda index: index.update(shards=change(index["shards"])))
    assert "documents is " in opened(shards)


@pytest.mark.parametrize("dtype", ["<f4", "<i8", ">u2", "<u4", "u1", "O", "V4", "<u2 ", "../x", ""])
def test_another_dtype(shards: Path, dtype: str) -> None:
    change_index(shards, lambda index: index.update(dtype=dtype))
    assert f"dtype is {dtype!r}, of 400 ids it is <u2" in opened(shards)


@pytest.mark.parametrize(
    ("key", "value"), [("vocab_size", 0), ("vocab_size", 2**33), ("bos_id", 400), ("bos_id", True)]
)
def test_ids_that_do_not_fit(shards: Path, key: str, value: int) -> None:
    change_index(shards, lambda index: index.update({key: value}))
    assert f"{key} is {value}" in opened(shards)


@pytest.mark.parametrize("harm", [become_folder, become_loop, become_dangling])
@pytest.mark.parametrize("name", ["index.json", "shard_00000.tokens", "shard_00000.documents"])
def test_something_else_than_a_file(shards: Path, harm: Callable[[Path], None], name: str) -> None:
    harm(shards / name)
    opened(shards)


def seal(shards: Path, kind: str) -> None:
    """Make the index agree with a file as it is now: who lies may compute a checksum too."""
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
def test_offsets_that_cut_nothing(shards: Path, name: str) -> None:
    """Of a shard whose sizes and checksums are right."""
    path = shards / "shard_00000.documents"
    OFFSETS[name](np.fromfile(path, "<i8")).astype("<i8").tofile(path)
    seal(shards, "documents")
    assert f"{path} does not cut" in opened(shards)


@pytest.mark.parametrize("workers", [0, 1])
def test_in_a_run(settings: dict, corpus: SimpleNamespace, shards: Path, workers: int) -> None:
    """Found in training's own process or in one that makes its rows: the same sentence, and nothing trained."""
    path, run = shards / "shard_00000.documents", Path(settings["run"]["dir"])
    OFFSETS["backwards"](np.fromfile(path, "<i8")).astype("<i8").tofile(path)
    seal(shards, "documents")
    settings["data"]["train"]["prose"] = str(shards)
    settings["data"]["workers"] = workers
    run.mkdir()
    copy = {"tokenizer", *(f"tokenizer/{path.name}" for path in corpus.tokenizer.iterdir())}
    begun = copy | {"config.yaml", "events.jsonl", "metrics.jsonl", "router.jsonl"}
    assert f"{path} does not cut" in refusal(lambda: train(settings), shards, run, gains=REFUSED_START | begun)
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
PACKED = {
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


def both_refuse(path: Path, tokenizer: Path, sentence: str) -> None:
    """As a source that is read as it is, and as input of a preparation; neither changes the file."""
    parent = path.parent.parent
    message = refusal(lambda: TextSource([path], tokenizer, cache=parent / "cache"), path.parent)
    assert sentence in message
    assert str(path) in message
    message = refusal(lambda: prepare_data([path], tokenizer, parent / "out"), path.parent)
    assert sentence in message
    assert str(path) in message


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder for them alone."""
    (tmp_path / "texts").mkdir()
    return tmp_path / "texts"


@pytest.mark.parametrize("case", [*TEXTS, *PACKED], ids=range(len(TEXTS) + len(PACKED)))
def test_a_text_that_is_none(corpus: SimpleNamespace, texts: Path, case: tuple[str, bytes]) -> None:
    name, content = case
    (texts / name).write_bytes(content)
    both_refuse(texts / name, corpus.tokenizer, (TEXTS | PACKED)[case])


@pytest.mark.parametrize("name", TABLES)
def test_a_table_without_text(corpus: SimpleNamespace, texts: Path, name: str) -> None:
    columns, sentence = TABLES[name]
    pq.write_table(pa.table(columns), texts / "a.parquet")
    both_refuse(texts / "a.parquet", corpus.tokenizer, sentence)


@pytest.mark.parametrize("text", ["", "{}", "[]", "\0", '{"model": {"type": "x"}}', '{"version": "1.0"}', "[" * 10**5])
def test_a_tokenizer_that_is_none(corpus: SimpleNamespace, texts: Path, text: str) -> None:
    (texts / "a.jsonl").write_bytes(LINE)
    (texts / "tokenizer.json").write_text(text)
    message = refusal(lambda: prepare_data([texts / "a.jsonl"], texts, texts.parent / "out"), texts)
    assert f"{texts / 'tokenizer.json'} cannot be read as a tokenizer" in message
    shutil.copy(corpus.tokenizer / "tokenizer.json", texts)
    prepare_data([texts / "a.jsonl"], texts, texts.parent / "out")
