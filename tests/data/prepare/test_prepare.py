"""Preparing shards: every kind of file, every kind of bad file, and a kill before every rename."""

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.small_files import compress_zstd, decode_documents, read_folder, tokenizer_with_gap, write_jsonl
from trinity.data.prepare import prepare, shard_writer, tokenize
from trinity.data.prepare.prepare import prepare_data
from trinity.data.sources import documents
from trinity.data.sources.file_formats import zstd as zstd_library
from trinity.data.sources.shards import TokenSource
from trinity.data.sources.text import TextSource
from trinity.data.tokenizer.tokenizer import BOS, load_tokenizer, token_byte_lengths
from trinity.data.tokenizer.train import _texts
from trinity.errors import UserError
from trinity.io import checksum, local

TEXTS = [f"Document {number}: " + "some words of text, 日本語, 12345. " * (number % 7) for number in range(60)]


def test_every_kind_of_file(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[0])
    write_jsonl(tmp_path / "b.jsonl", [*TEXTS[1:10], "", *TEXTS[10:20]])
    raw = "\n".join(json.dumps({"text": text}) for text in TEXTS[20:30])
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(raw.encode()))
    table = pyarrow.table({"n": list(range(20)), "text": TEXTS[30:50]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=7)
    frames = [write_jsonl(tmp_path / "frame", part).read_bytes() for part in (TEXTS[50:53], TEXTS[53:])]
    (tmp_path / "e.jsonl.zst").write_bytes(b"".join(map(compress_zstd, frames)))
    inputs = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.jsonl.gz", "d.parquet", "e.jsonl.zst")]
    index, already = prepare_data(inputs, tokenizer_dir, tmp_path / "out", shard_tokens=500)
    assert not already
    assert decode_documents(tmp_path / "out", tokenizer_dir) == TEXTS
    assert index["text_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert index["skipped"] == {"empty": 1}
    assert index["input_documents"] == [1, 19, 10, 20, 10]
    assert sum(index["document_lengths"]) == 60
    assert len(index["shards"]) > 3


def test_special_tokens_in_text_are_text(tmp_path: Path, tokenizer_dir: Path) -> None:
    texts = [f"a {BOS} b", "<|end_of_text|>"]
    prepare_data([write_jsonl(tmp_path / "a.jsonl", texts)], tokenizer_dir, tmp_path / "out")
    assert decode_documents(tmp_path / "out", tokenizer_dir) == texts


def test_batch_size_changes_no_byte(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [write_jsonl(tmp_path / "a.jsonl", TEXTS)]
    prepare_data(inputs, tokenizer_dir, tmp_path / "large", shard_tokens=500)
    monkeypatch.setattr(documents, "BATCH_BYTES", 300)
    monkeypatch.setattr(prepare, "BATCH_BYTES", 300)
    prepare_data(inputs, tokenizer_dir, tmp_path / "small", shard_tokens=500)
    assert read_folder(tmp_path / "large") == read_folder(tmp_path / "small")
    monkeypatch.setattr(tokenize, "GROUP_CHARACTERS", 100)
    monkeypatch.setattr(tokenize, "PIECE_CHARACTERS", 40)
    prepare_data(inputs, tokenizer_dir, tmp_path / "pieces", shard_tokens=500)
    assert read_folder(tmp_path / "large") == read_folder(tmp_path / "pieces")


class Killed(BaseException):
    """An exception that no code catches, like SIGKILL."""


def kill_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """Die just before the moment-th file is renamed."""
    moves = iter(range(moment))

    def move(path: Path) -> None:
        if next(moves, None) is None:
            raise Killed
        real(path)

    real = local.publish
    monkeypatch.setattr(local, "publish", move)
    monkeypatch.setattr(shard_writer, "publish", move)


def test_killed_at_any_moment_and_started_again(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two inputs, empty and unreadable documents among them: the same bytes as without a kill."""
    inputs = [
        write_jsonl(tmp_path / "a.jsonl", [*TEXTS[:30], "", ""]),
        write_jsonl(tmp_path / "b.jsonl", ["", *TEXTS[30:]]),
    ]
    with open(inputs[0], "a") as file:
        file.write("not json\n")
    arguments = {"shard_tokens": 900, "skip_bad_lines": True}
    index, _ = prepare_data(inputs, tokenizer_dir, tmp_path / "whole", **arguments)
    assert index["skipped"] == {"empty": 3, "unreadable": 1}
    moves = 2 + 3 * len(index["shards"])  # progress.json at first, three files a shard, index.json
    assert moves >= 14
    for moment in range(moves):
        out = tmp_path / f"out{moment}"
        with monkeypatch.context() as patch:
            kill_at(patch, moment)
            with pytest.raises(Killed):
                prepare_data(inputs, tokenizer_dir, out, **arguments)
        complete = {name for name in read_folder(out) if name.endswith((".tokens", ".documents"))}
        before = {name: (out / name).stat().st_ino for name in complete}
        _, already = prepare_data(inputs, tokenizer_dir, out, **arguments)
        assert not already
        assert read_folder(out) == read_folder(tmp_path / "whole")
        whole = max(0, moment - 1) // 3
        for number in range(whole):
            name = f"shard_{number:05d}.tokens"
            assert (out / name).stat().st_ino == before[name], "a finished shard was made again"


def test_killed_before_progress_is_removed(tmp_path: Path, tokenizer_dir: Path) -> None:
    inputs = [write_jsonl(tmp_path / "a.jsonl", TEXTS)]
    prepare_data(inputs, tokenizer_dir, tmp_path / "out")
    whole = read_folder(tmp_path / "out")
    shutil.copy(tmp_path / "out" / "index.json", tmp_path / "out" / "progress.json")
    assert prepare_data(inputs, tokenizer_dir, tmp_path / "out")[1]
    assert read_folder(tmp_path / "out") == whole


@pytest.mark.parametrize(
    "harm",
    [
        Path.unlink,
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\1"),
    ],
    ids=["missing", "cut short", "changed"],
)
def test_the_same_command_repairs_damage(tmp_path: Path, tokenizer_dir: Path, harm: Callable) -> None:
    inputs = [write_jsonl(tmp_path / "a.jsonl", TEXTS)]
    index, _ = prepare_data(inputs, tokenizer_dir, tmp_path / "out", shard_tokens=500)
    whole = read_folder(tmp_path / "out")
    assert prepare_data(inputs, tokenizer_dir, tmp_path / "out", shard_tokens=500) == (index, True)
    harm(tmp_path / "out" / "shard_00001.documents")
    with pytest.raises(UserError, match="shard_00001"):
        TokenSource(tmp_path / "out")
    assert prepare_data(inputs, tokenizer_dir, tmp_path / "out", shard_tokens=500) == (index, False)
    assert read_folder(tmp_path / "out") == whole


def test_a_folder_with_other_files_is_not_changed(tmp_path: Path, tokenizer_dir: Path) -> None:
    inputs, out = [write_jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"holds something else \(thesis.tex\)"):
        prepare_data(inputs, tokenizer_dir, out)
    assert read_folder(out) == {"thesis.tex": b"mine"}
    (out / "thesis.tex").unlink()
    prepare_data(inputs, tokenizer_dir, out)
    whole = read_folder(out)
    changed = write_jsonl(tmp_path / "b.jsonl", TEXTS)
    with pytest.raises(UserError, match="whose inputs differ"):
        prepare_data([changed], tokenizer_dir, out)
    with pytest.raises(UserError, match="whose shard_tokens differ"):
        prepare_data(inputs, tokenizer_dir, out, shard_tokens=77)
    other = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, other)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    with pytest.raises(UserError, match="whose tokenizer differ"):
        prepare_data(inputs, other, out)
    assert read_folder(out) == whole


def test_an_input_changed_in_place_is_noticed(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Same name, same size, one letter."""
    path, out = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out"
    prepare_data([path], tokenizer_dir, out)
    path.write_text(path.read_text().replace("Document 33", "Dokument 33"))
    with pytest.raises(UserError, match="whose inputs differ"):
        prepare_data([path], tokenizer_dir, out)


@pytest.mark.parametrize(("size", "places"), [(1 << 20, [0, 500_000, (1 << 20) - 1]), (10_000_000, [0, 9_900_000])])
def test_identity_hashes_small_files_whole_and_samples_large_ones(tmp_path: Path, size: int, places: list[int]) -> None:
    """9,900,000 is in the last of 64 blocks of 65,536 bytes, which begins at 63/64 of the file."""
    path = tmp_path / "a"
    path.write_bytes(bytes(size))
    before = checksum.identity(path)
    for place in places:
        path.write_bytes(bytes(place) + b"x" + bytes(size - place - 1))
        assert checksum.identity(path)["bytes"] == before["bytes"]
        assert checksum.identity(path)["sample"] != before["sample"]


GOOD = b'{"text": "good"}\n'
BAD = {
    "json": ("a.jsonl", GOOD + b"{oops\n", r"a\.jsonl:2 is not valid JSON"),
    "field": ("a.jsonl", GOOD + b'{"body": "x"}\n', r"a\.jsonl:2 has no field text \(fields: body\)"),
    "object": ("a.jsonl", GOOD + b"[1]\n", r"a\.jsonl:2 has no field text"),
    "number": ("a.jsonl", GOOD + b'{"text": 3}\n', r"a\.jsonl:2 holds int where text"),
    "surrogate": ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', r"a\.jsonl:2 holds half a surrogate pair"),
    "utf-8 line": ("a.jsonl", GOOD + b'{"text": "\xff"}\n', r"a\.jsonl is not valid UTF-8 at byte 27"),
    "utf-8 text": ("a.txt", b"abc\xc3", r"a\.txt is not valid UTF-8 at byte 3"),
    "empty": ("a.txt", b"", r"a\.txt holds no document with text"),
    "empty lines": ("a.jsonl", b'\n{"text": ""}\n', r"a\.jsonl holds no document with text"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(GOOD * 1000)[:-9], r"a\.jsonl\.gz is not a whole gzip file"),
    "no gzip": ("a.jsonl.gz", GOOD, r"a\.jsonl\.gz is not a whole gzip file"),
    "broken gzip": (
        "a.jsonl.gz",
        gzip.compress(GOOD)[:20] + b"~" * 40,
        r"a\.jsonl\.gz is not a whole gzip file",
    ),
    "cut zstd": ("a.jsonl.zst", compress_zstd(GOOD * 1000)[:-9], r"a\.jsonl\.zst is not a whole zstd file"),
    "no zstd": ("a.jsonl.zst", GOOD, r"a\.jsonl\.zst is not a whole zstd file"),
    "list": ("a.jsonl", GOOD + b'{"text": ["x"]}\n', r"a\.jsonl:2 holds list where text"),
    "null": ("a.jsonl", GOOD + b'{"text": null}\n', r"a\.jsonl:2 holds NoneType where text"),
    "deep": ("a.jsonl", GOOD + b"[" * 200_000 + b"\n", r"a\.jsonl:2 is not valid JSON"),
    "no parquet": ("a.parquet", GOOD, r"a\.parquet is not a whole Parquet file"),
    "kind": ("a.json", GOOD, r"a\.json is of a kind that is not read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(tmp_path: Path, tokenizer_dir: Path, case: str) -> None:
    name, raw, words = BAD[case]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=words):
        prepare_data([tmp_path / name], tokenizer_dir, tmp_path / "out")
    (tmp_path / name).write_bytes(GOOD)
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    prepare_data([tmp_path / "good.jsonl"], tokenizer_dir, tmp_path / "out")
    assert decode_documents(tmp_path / "out", tokenizer_dir) == ["good"]


def test_bad_parquet_is_named(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", None]}), path)
    with pytest.raises(UserError, match=r"has no column text; set --field .*to one of: body"):
        prepare_data([path], tokenizer_dir, tmp_path / "out")
    with pytest.raises(UserError, match=r"a\.parquet:2 holds NoneType where text"):
        prepare_data([path], tokenizer_dir, tmp_path / "out", field="body")
    index, _ = prepare_data([path], tokenizer_dir, tmp_path / "out", field="body", skip_bad_lines=True)
    assert (index["documents"], index["skipped"]) == (1, {"unreadable": 1})


def test_missing_things_are_named(tmp_path: Path, tokenizer_dir: Path) -> None:
    good, empty = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "empty"
    empty.mkdir()
    (empty / "a.zip").write_bytes(b"PK")
    cases = [
        ([tmp_path / "none.txt"], tokenizer_dir, r"none\.txt does not exist"),
        ([tmp_path / "*.text"], tokenizer_dir, r"\*\.text matches no file"),
        ([empty], tokenizer_dir, "--input .*empty holds no file that is read"),
        ([good], tmp_path / "none", r"holds no tokenizer\.json"),
    ]
    for inputs, tokenizer, words in cases:
        with pytest.raises(UserError, match=words):
            prepare_data(inputs, tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match="--shard-tokens 0 must be at least 1"):
        prepare_data([good], tokenizer_dir, tmp_path / "out", shard_tokens=0)
    with pytest.raises(UserError, match=re.escape(f"--out {good} is a file")):
        prepare_data([good], tokenizer_dir, good)
    with pytest.raises(UserError, match="--workers -1 must be 0 or more"):
        prepare_data([good], tokenizer_dir, tmp_path / "out", workers=-1)
    with pytest.raises(UserError, match="--out s3://bucket/a is a URL; give a local folder"):
        prepare_data([good], tokenizer_dir, "s3://bucket/a")
    assert not (tmp_path / "out").exists()


MARK = b"\xef\xbb\xbf"
MARKED = {
    "a.txt": (MARK + "é\ufeff".encode(), ["é\ufeff"]),
    "a.jsonl": (MARK + GOOD + MARK + GOOD, ["good", "good"]),  # one of two files that were put together
    "b.jsonl": (b'{"text": "\\ufeffa\\ufeff"}\n', ["a\ufeff"]),  # of the file that the text once was
    "a.jsonl.gz": (gzip.compress(MARK + GOOD), ["good"]),
}


@pytest.mark.parametrize("name", MARKED)
def test_byte_order_marks_are_removed(tmp_path: Path, tokenizer_dir: Path, name: str) -> None:
    """In shards, in text that a run reads, and in a tokenizer's training text; later in a text it is text."""
    raw, expected = MARKED[name]
    (tmp_path / name).write_bytes(raw)
    prepare_data([tmp_path / name], tokenizer_dir, tmp_path / "out")
    assert decode_documents(tmp_path / "out", tokenizer_dir) == expected
    source = TextSource([tmp_path / name], tokenizer_dir, cache=tmp_path / "cache")
    assert [source._text(document) for document in range(source.documents)] == expected
    assert list(_texts([tmp_path / name], "text", None, 0, False)) == expected
    assert list(_texts([tmp_path / name], "text", 1000, 0, False)) == expected


def long_zstd(raw: bytes, window_log: int) -> bytes:
    """Compress as `zstd --long=WINDOW_LOG` does from a pipe: without the content's size."""
    options = {
        zstd_library.CompressionParameter.window_log: window_log,
        zstd_library.CompressionParameter.enable_long_distance_matching: 1,
        # small tables: the reader needs memory for the window alone
        zstd_library.CompressionParameter.hash_log: 10,
        zstd_library.CompressionParameter.chain_log: 10,
        zstd_library.CompressionParameter.ldm_hash_log: 10,
    }
    packer = zstd_library.ZstdCompressor(options=options)
    return packer.compress(raw) + packer.flush()


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_zstd_with_a_long_window(tmp_path: Path, tokenizer_dir: Path, window_log: int) -> None:
    """Two consecutive frames."""
    parts = [write_jsonl(tmp_path / "part", texts).read_bytes() for texts in (TEXTS[:20], TEXTS[20:])]
    packed = long_zstd(parts[0], window_log) + long_zstd(parts[1], window_log)
    assert packed[5] >> 3 == window_log - 10  # the window's size, in the frame's header (RFC 8878, 3.1.1.1.2)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(packed)
    prepare_data([path], tokenizer_dir, tmp_path / "out")
    assert decode_documents(tmp_path / "out", tokenizer_dir) == TEXTS
    path.write_bytes(packed[:-3])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst is not a whole zstd file"):
        prepare_data([path], tokenizer_dir, tmp_path / "cut")


def test_one_file_without_the_column(tmp_path: Path, tokenizer_dir: Path) -> None:
    """The file is named; no file of a folder is left out silently."""
    for name, column in (("a", "text"), ("b", "body"), ("c", "text")):
        pyarrow.parquet.write_table(pyarrow.table({column: ["x"]}), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=r"b\.parquet has no column text; set --field .*to one of: body"):
        prepare_data([tmp_path], tokenizer_dir, tmp_path / "out" / "shards")


def test_ids_with_gaps(tmp_path: Path, tokenizer_dir: Path) -> None:
    """701 ids, of which the largest is 70,000: shards of four bytes an id that hold it."""
    gap = tokenizer_with_gap(tokenizer_dir, tmp_path / "gap", 70_000)
    assert load_tokenizer(gap).get_vocab_size() == 701
    index, _ = prepare_data([write_jsonl(tmp_path / "a.jsonl", ["a <|gap|> b"])], gap, tmp_path / "out")
    assert (index["vocab_size"], index["dtype"]) == (70_001, "<u4")
    assert TextSource([tmp_path / "a.jsonl"], gap, cache=tmp_path / "cache").vocab_size == 70_001
    assert len(token_byte_lengths(load_tokenizer(gap))) == 70_001


def test_skipping_bad_lines_counts_them(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"{oops\n" + b'{"text": "\xff"}\n' + b"\n" + GOOD)
    with pytest.raises(UserError, match=":2 is not valid JSON"):
        prepare_data([path], tokenizer_dir, tmp_path / "out")
    index, _ = prepare_data([path], tokenizer_dir, tmp_path / "out", skip_bad_lines=True)
    assert index["skipped"] == {"empty": 1, "unreadable": 2}
    assert decode_documents(tmp_path / "out", tokenizer_dir) == ["good", "good"]
