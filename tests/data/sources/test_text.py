"""Text tokenised on demand against shards prepared from the same files, document by document."""

import json
import multiprocessing
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from trinity.data import BatchPlan, SequenceStream
from trinity.data.prepare.prepare import prepare_data
from trinity.data.sources import text as text_source
from trinity.data.sources import text_index
from trinity.data.sources.shards import TokenSource
from trinity.data.sources.text import TextSource
from trinity.data.sources.text_reader import LRUCache
from trinity.data.stream.loader import Loader
from trinity.data.stream.mixture import Phase
from trinity.data.tokenizer.tokenizer import BOS, EOS
from trinity.errors import UserError

TEXTS = [
    "plain text",
    f"{BOS} spelled out, and {EOS}{BOS}",
    "",
    " \n",
    "1234567 日本語 ภาษา\u2028\x00 é",
    "\r\nword\r\n",
    "def f(x):\n    return x\n" * 50,
    "",
    "a",
]


def write_text(path: Path) -> Path:
    path.write_bytes(TEXTS[6].encode())
    return path


def write_jsonl(path: Path) -> Path:
    """Blank lines, another field before and after, Windows line ends, and no newline at the end."""
    rows = [json.dumps({"x": {"y": text}, "text": text, "id": 1}, ensure_ascii=number % 2 == 0) for number, text in
            enumerate(TEXTS)]  # fmt: skip
    path.write_bytes("\n".join([*rows[:3], "", "  ", rows[3] + "\r", *rows[4:]]).encode())
    return path


def write_parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS}), path, row_group_size=2)
    return path


def write_mix(folder: Path) -> list[Path]:
    (folder / "empty.txt").touch()
    (folder / "empty.jsonl").write_text('{"text": ""}\n\n')
    files = [write_jsonl(folder / "a.jsonl"), folder / "empty.txt", write_parquet(folder / "b.parquet")]
    return [*files, folder / "empty.jsonl", write_text(folder / "c.txt"), write_jsonl(folder / "d.jsonl")]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def mixed(tmp_path: Path) -> list[Path]:
    return write_mix(tmp_path)


@pytest.fixture
def open_source(mixed: list[Path], tokenizer_dir: Path, cache: Path) -> Callable[..., TextSource]:
    """Open the mix of files as a source."""
    return lambda **options: TextSource(mixed, tokenizer_dir, cache=cache, **options)


@pytest.fixture
def shards(mixed: list[Path], tokenizer_dir: Path, tmp_path: Path) -> TokenSource:
    """The shards that prepare_data makes of them."""
    prepare_data(mixed, tokenizer_dir, tmp_path / "shards", shard_tokens=200)
    return TokenSource(tmp_path / "shards")


@pytest.fixture
def tokenised_texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were tokenised, in order."""
    texts: list[str] = []
    encode = text_source._encode
    monkeypatch.setattr(text_source, "_encode", lambda encoder, batch: texts.extend(batch) or encode(encoder, batch))
    return texts


def check_equal(source: TextSource, shards: TokenSource) -> None:
    """The lengths of all documents at once; then every document in random order, in one piece and in two."""
    every = np.arange(shards.documents)
    np.testing.assert_array_equal(source.lengths(every), shards.lengths(every))
    for name in ("documents", "tokens", "vocab_size", "bos_id", "tokenizer_fingerprint"):
        assert getattr(source, name) == getattr(shards, name)
    for document in np.random.default_rng(0).permutation(shards.documents).tolist():
        length = shards.length(document)
        assert source.length(document) == length
        ids, expected = source.read(document, 0, length), shards.read(document, 0, length)
        assert ids.dtype == expected.dtype
        assert not ids.flags.writeable
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_array_equal(source.read(document, 1, length - 1), expected[1:])
        assert len(source.read(document, length, 0)) == 0


@pytest.mark.parametrize(
    ("write", "name"), [(write_text, "a.txt"), (write_jsonl, "a.jsonl"), (write_parquet, "a.parquet")]
)
def test_one_file_equals_its_shards(
    write: Callable, name: str, tokenizer_dir: Path, tmp_path: Path, cache: Path
) -> None:
    path = write(tmp_path / name)
    prepare_data([path], tokenizer_dir, tmp_path / "shards")
    check_equal(TextSource([path], tokenizer_dir, cache=cache), TokenSource(tmp_path / "shards"))


def test_a_mix_of_files_equals_its_shards(open_source: Callable, shards: TokenSource) -> None:
    assert shards.documents == 7 + 7 + 1 + 7
    check_equal(open_source(), shards)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rsdb_size", [0, 3])
def test_a_run_reads_the_same_batches(open_source: Callable, shards: TokenSource, workers: int, rsdb_size: int) -> None:
    """Through packing and, in forked workers, tokenising in the background; more than one epoch of 22 documents."""
    batches = []
    for source in (open_source(), shards):
        stream = SequenceStream(
            {"mix": source}, [Phase((1.0,), rsdb_size)], streams=4, seed=1, bos_id=source.bos_id,
            plan=BatchPlan(4, [], 32),
        )  # fmt: skip
        loader = Loader(stream, workers, ahead=8)
        batches.append([loader.take(4) for _ in range(30)])
        loader.close()
    assert shards.tokens < 30 * 4 * 32
    for text, prepared in zip(*batches):
        assert text.pieces == prepared.pieces
        for name in ("tokens_BS", "targets_BS", "document_ids_BS"):
            assert torch.equal(getattr(text, name), getattr(prepared, name))


def test_another_field(tmp_path: Path, tokenizer_dir: Path, cache: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "body": "two"}\n{"text": "three", "body": ""}\n')
    source = TextSource([path], tokenizer_dir, field="body", cache=cache)
    prepare_data([path], tokenizer_dir, tmp_path / "shards", field="body")
    check_equal(source, TokenSource(tmp_path / "shards"))
    assert source.fingerprint != TextSource([path], tokenizer_dir, cache=cache).fingerprint


def test_lengths_of_many(open_source: Callable, shards: TokenSource, tokenised_texts: list[str]) -> None:
    """Any order, documents twice, none at all; nothing is tokenised twice."""
    source = open_source()
    documents = np.array([5, 0, 21, 5, 14, 9])
    for numbers in (documents, documents[:0], documents[::-1], np.arange(22), documents):
        lengths = source.lengths(numbers)
        assert lengths.dtype == np.int64
        np.testing.assert_array_equal(lengths, shards.lengths(numbers))
    assert len(tokenised_texts) == 22


def test_lengths_from_another_process(open_source: Callable, tokenised_texts: list[str]) -> None:
    worker, source = open_source(), open_source()
    documents = np.array([3, 20, 1])
    lengths = worker.lengths(documents)
    tokenised_texts.clear()
    source.keep_lengths(documents, lengths)
    assert [source.length(document) for document in documents] == lengths.tolist()
    np.testing.assert_array_equal(source.lengths(documents[::-1]), lengths[::-1])
    assert tokenised_texts == []


def test_pieces_of_a_document_tokenise_it_once(
    open_source: Callable, shards: TokenSource, tokenised_texts: list[str]
) -> None:
    source = open_source()
    for start in range(0, shards.length(4), 10):
        length = min(10, shards.length(4) - start)
        np.testing.assert_array_equal(source.read(4, start, length), shards.read(4, start, length))
    assert len(tokenised_texts) == 1


def test_a_cache_that_holds_one_document(
    open_source: Callable, shards: TokenSource, tokenised_texts: list[str]
) -> None:
    source = open_source(cache_bytes=1)
    check_equal(source, shards)
    tokenised_texts.clear()
    for document in (0, 0, 1, 1, 0):
        source.read(document, 0, 2)
    assert len(tokenised_texts) == 3


def test_the_least_recently_used_value_is_dropped() -> None:
    cache: LRUCache[str, int] = LRUCache(10)
    for number, key in enumerate("abc"):
        cache.put(key, number, 4)
        cache.get("a")
    assert [cache.get(key) for key in "abc"] == [0, None, 2]
    cache.put("large", 3, 99)
    assert [cache.get(key) for key in ("a", "c", "large")] == [None, None, 3]


def test_pickled(
    open_source: Callable, shards: TokenSource, tmp_path: Path, mixed: list[Path], tokenizer_dir: Path
) -> None:
    source = open_source()
    check_equal(source, shards)
    packed = pickle.dumps(source)
    assert len(packed) < 4000  # no ids, no arrays, no vocabulary
    again = pickle.loads(packed)
    check_equal(again, shards)
    assert (again.fingerprint, again.directory) == (source.fingerprint, tmp_path.resolve())

    shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    packed = pickle.dumps(TextSource(mixed, tmp_path / "tokenizer", cache=source._index.folder.parents[1]))
    with open(tmp_path / "tokenizer" / "tokenizer.json", "a") as file:
        file.write(" ")
    with pytest.raises(UserError, match="tokenizer has changed since this run began"):
        pickle.loads(packed)


def test_after_a_fork(open_source: Callable, shards: TokenSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent has used the library's threads, which a forked child lacks and must not wait for."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    source = open_source()
    source.lengths(np.arange(10))  # many at once, which takes threads
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=check_equal, args=(source, shards)) for _ in range(2)]
    for child in children:
        child.start()
    check_equal(source, shards)
    for child in children:
        child.join(timeout=20)
        if child.is_alive():
            child.kill()
            child.join()
        assert child.exitcode == 0


def test_tokens_of_much_text_are_estimated(
    tmp_path: Path, tokenizer_dir: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From every 10th document and 200 of up to 400 characters of each: within 2 %, and the same in every process."""
    words = np.random.default_rng(0).choice(TEXTS[6].split() + TEXTS[0].split(), 200_000).tolist()
    texts = [" ".join(words[at : at + 20 + at % 40]) for at in range(0, len(words), 60)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare_data([path], tokenizer_dir, tmp_path / "shards")
    shards = TokenSource(tmp_path / "shards")
    source = TextSource([path], tokenizer_dir, cache=cache)
    assert source._index.text_bytes == shards.text_bytes
    monkeypatch.setattr(text_source, "COUNTED_BYTES", shards.text_bytes // 10 + 1)
    monkeypatch.setattr(text_source, "COUNTED_CHARACTERS", 200)
    estimate = source.tokens
    assert estimate != shards.tokens
    assert estimate == pytest.approx(shards.tokens, rel=0.02)
    monkeypatch.setattr(text_source, "_encode", None)
    assert TextSource([path], tokenizer_dir, cache=cache).tokens == estimate
    monkeypatch.undo()
    next(cache.rglob("tokens.*.json")).write_text("{")
    assert TextSource([path], tokenizer_dir, cache=cache).tokens == shards.tokens


def test_the_index_is_made_once(
    open_source: Callable, shards: TokenSource, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """A second start reads no input, and gives the same."""
    first = open_source()
    for name in ("read_with_progress", "identity"):
        monkeypatch.setattr(text_index, name, None)
    second = open_source()
    assert second.fingerprint == first.fingerprint
    check_equal(second, shards)
    monkeypatch.setenv("TRINITY_CACHE", str(cache))
    check_equal(TextSource(first.files, second._tokenizer), shards)


def test_processes_that_start_together_index_once(open_source: Callable, tmp_path: Path) -> None:
    """Each process that indexes leaves a line."""
    read = text_index.read_with_progress

    def noted(*arguments: object) -> object:
        with open(tmp_path / "log", "a") as log:
            log.write("indexed\n")
        return read(*arguments)

    def start() -> None:
        text_index.read_with_progress = noted
        assert open_source().documents == 22

    children = [multiprocessing.get_context("fork").Process(target=start) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "indexed\n"


def test_folders_patterns_and_urls(
    mixed: list[Path], shards: TokenSource, tokenizer_dir: Path, cache: Path, tmp_path: Path
) -> None:
    """Files are those of expand_inputs; a remote file is copied once, and again when it has changed."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    for path in mixed:
        shutil.copy(path, folder)
    prepare_data([folder], tokenizer_dir, tmp_path / "sorted", kind="all")
    for inputs in (folder, folder / "*"):
        check_equal(TextSource([inputs], tokenizer_dir, cache=cache, kind="all"), TokenSource(tmp_path / "sorted"))

    remote = fsspec.filesystem("memory")
    remote.put(str(folder), "/text_source", recursive=True)
    urls = [f"memory://text_source/{path.name}" for path in mixed]
    source = TextSource(urls, tokenizer_dir, cache=cache)
    check_equal(source, shards)
    assert source.fingerprint == TextSource(mixed, tokenizer_dir, cache=cache).fingerprint
    copies = {path: path.stat().st_ino for path in source.files}
    assert {path: path.stat().st_ino for path in TextSource(urls, tokenizer_dir, cache=cache).files} == copies
    remote.pipe("/text_source/c.txt", b"another text, and a longer one")
    changed = TextSource(urls, tokenizer_dir, cache=cache)
    assert changed.fingerprint != source.fingerprint
    assert len(set(changed.files) & set(copies)) == len(mixed) - 1


@pytest.mark.parametrize("name", ["index.json", "offsets", "first"])
@pytest.mark.parametrize("harm", ["gone", "cut", "flipped"])
def test_a_damaged_index_is_rebuilt(open_source: Callable, shards: TokenSource, name: str, harm: str) -> None:
    fingerprint = open_source().fingerprint
    path = open_source()._index.folder / name
    content = path.read_bytes()
    path.unlink()
    if harm == "cut":
        path.write_bytes(content[:-3])
    elif harm == "flipped":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    source = open_source()
    assert source.fingerprint == fingerprint
    check_equal(source, shards)
    assert path.read_bytes() == content


def test_the_fingerprint_is_of_the_content(
    open_source: Callable, mixed: list[Path], tokenizer_dir: Path, cache: Path, tmp_path: Path
) -> None:
    """Another folder or time does not change it; another byte, order or tokenizer does."""
    source = open_source()
    os.utime(mixed[0], (1, 1))
    assert open_source().fingerprint == source.fingerprint
    (tmp_path / "elsewhere").mkdir()
    copies = [Path(shutil.copy(path, tmp_path / "elsewhere")) for path in mixed]
    assert TextSource(copies, tokenizer_dir, cache=cache).fingerprint == source.fingerprint
    assert TextSource(copies[::-1], tokenizer_dir, cache=cache).fingerprint != source.fingerprint
    mixed[4].write_text("another text")
    assert open_source().fingerprint != source.fingerprint


@pytest.mark.parametrize("position", [0, 2, 4], ids=["jsonl", "parquet", "text"])
def test_a_file_that_changes_is_refused(open_source: Callable, mixed: list[Path], position: int) -> None:
    """Also when it was read before the change, and when it is removed."""
    source = open_source()
    document = int(source._index.first[position])
    source.read(document, 0, 2)
    fresh = pickle.loads(pickle.dumps(source))
    with open(mixed[position], "ab") as file:
        file.write(b"\n")
    another = document + 1 if position != 4 else document
    for reader in (source, fresh) if position != 4 else (fresh,):
        with pytest.raises(UserError, match=re.escape(f"{mixed[position]} has changed since this run indexed it")):
            reader.read(another, 0, 2)
    mixed[position].unlink()
    with pytest.raises(UserError, match="has changed since"):
        fresh.read(document, 0, 2)


def test_a_file_that_is_written_while_it_is_indexed(
    open_source: Callable, mixed: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = text_index.read_with_progress

    def slow(*arguments: object) -> object:
        yield from read(*arguments)
        with open(mixed[0], "a") as file:
            file.write('\n{"text": "more"}')

    with monkeypatch.context() as patched:
        patched.setattr(text_index, "read_with_progress", slow)
        with pytest.raises(UserError, match=re.escape(f"{mixed[0]} was written to while it was read")):
            open_source()
    assert open_source().documents == 23


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "good"}\n\n{"text": \n', ":3 is not valid JSON"),
        ("a.jsonl", b'{"body": "good"}\n', ":1 has no field text"),
        ("a.txt", b"ab\xff", " is not valid UTF-8 at byte 2"),
        ("a.jsonl", b'{"text": ""}\n\n', ": no document with text; give a file that holds one"),
        ("a.jsonl.gz", b"", ": no document with text; give a file that holds one"),
        ("a.jsonl.zst", b"", " is not a whole zstd file"),
    ],
)
def test_bad_input_leaves_no_index(
    name: str, content: bytes, sentence: str, tmp_path: Path, tokenizer_dir: Path, cache: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(UserError, match=re.escape(f"{path}{sentence}")):
            TextSource([path], tokenizer_dir, cache=cache)
    assert not list(cache.rglob("index.json"))
