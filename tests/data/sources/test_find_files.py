"""The files of a folder or pattern: through links, of one kind, each once; the files left out are reported."""

import bz2
import errno
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from tests.data.small_files import compress_zstd, decode_documents, write_jsonl
from trinity.data.prepare.prepare import prepare_data
from trinity.data.sources import find_files
from trinity.data.sources.file_formats import FileKind, file_kind
from trinity.data.sources.inputs import expand_inputs, holds_text
from trinity.data.sources.text import TextSource
from trinity.errors import UserError, explain


@pytest.fixture
def notes(capsys: pytest.CaptureFixture) -> Callable[[], list[str]]:
    """The notes on stderr since the last call."""
    return lambda: [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]


def make_files(folder: Path, *names: str) -> Path:
    """Files that hold their own names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def names(paths: list, folder: Path | str) -> list[str]:
    return [str(path).removeprefix(f"{folder}/") for path in paths]


KINDS = {
    "a.txt": ("text", None), "a": ("text", None), "README.md": ("text", None), "x.csv": ("text", None),
    "a.jsonl": ("jsonl", None), "a.JSONL": ("jsonl", None), "a.ndjson": ("jsonl", None), "A.NDJSON": ("jsonl", None),
    "a.json.gz": ("jsonl", "gzip"), "a.JSON.GZ": ("jsonl", "gzip"), "a.json.zst": ("jsonl", "zstd"),
    "a.jsonl.gz": ("jsonl", "gzip"), "a.jsonl.zst": ("jsonl", "zstd"), "a.jsonl.ZST": ("jsonl", "zstd"),
    "a.ndjson.gz": ("jsonl", "gzip"), "a.ndjson.zst": ("jsonl", "zstd"), "a.jsonl.zstd": ("jsonl", "zstd"),
    "a.jsonl.bz2": ("jsonl", "bzip2"), "a.json.xz": ("jsonl", "xz"), "a.PARQUET": ("parquet", None),
    "https://host/a.jsonl?download=true": ("jsonl", None), "https://host/a.json.gz?x=a.txt#b": ("jsonl", "gzip"),
    "s3://bucket/a?.jsonl": ("jsonl", None),
    "a.json": None, "a.txt.gz": None, "a.zip": None, "a.jsonl.tmp": None, "a.Pdf": None, "a.tar.gz": None,
    "shard_00000.tokens": None,
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name: str) -> None:
    assert file_kind(name) == (FileKind(*KINDS[name]) if KINDS[name] else None)


PACK = {
    "a.JSONL": bytes, "b.ndjson": bytes, "c.json.gz": gzip.compress, "d.json.zst": compress_zstd,
    "e.jsonl.bz2": bz2.compress,
    "f.ndjson.xz": lzma.compress, "g.JSON.GZ": gzip.compress, "h.Jsonl.Zst": compress_zstd,
}  # fmt: skip


def test_lines_of_every_ending(tmp_path: Path, tokenizer_dir: Path) -> None:
    """A folder of them as shards, and read by a run."""
    folder = make_files(tmp_path / "folder", "nested/deep/a.JSONL").joinpath("nested/deep")
    for number, (name, pack) in enumerate(PACK.items()):
        lines = [json.dumps({"text": f"{name} {line}"}) + "\n" for line in range(number + 1)]
        (folder / name).write_bytes(pack("".join(lines).encode()))
    prepare_data([tmp_path / "folder"], tokenizer_dir, tmp_path / "out")
    expected = [f"{name} {line}" for number, name in enumerate(PACK) for line in range(number + 1)]
    assert decode_documents(tmp_path / "out", tokenizer_dir) == expected
    assert holds_text(tmp_path / "folder")
    source = TextSource([tmp_path / "folder"], tokenizer_dir, cache=tmp_path / "cache")
    assert [source._text(document) for document in range(source.documents)] == expected
    inode = {path: path.stat().st_ino for path in source._readable_files}
    assert len(inode) == len(PACK)
    again = TextSource([tmp_path / "folder"], tokenizer_dir, cache=tmp_path / "cache")
    assert {path: path.stat().st_ino for path in again._readable_files} == inode  # decompressed once
    (folder / "c.json.gz").write_bytes(gzip.compress(b'{"text": "another"}\n'))
    changed = TextSource([tmp_path / "folder"], tokenizer_dir, cache=tmp_path / "cache")
    assert changed._text(1 + 2) == "another"


def test_a_parquet_file_in_capitals(tmp_path: Path, tokenizer_dir: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "A.Parquet")
    prepare_data([tmp_path / "A.Parquet"], tokenizer_dir, tmp_path / "out")
    assert decode_documents(tmp_path / "out", tokenizer_dir) == ["one", "two"]
    source = TextSource([tmp_path / "A.Parquet"], tokenizer_dir, cache=tmp_path / "cache")
    assert [source._text(document) for document in range(2)] == ["one", "two"]


@pytest.mark.parametrize("data", ["a.parquet", "a.jsonl", "a.json.gz"])
def test_text_beside_data_is_left_out_and_reported(tmp_path: Path, notes: Callable, data: str) -> None:
    make_files(tmp_path, data, "sub/b" + data[1:], "README.md", "x.csv", "old.zip", ".git/config", ".gitignore")
    taken = [data, "sub/b" + data[1:]]
    assert names(expand_inputs([tmp_path]), tmp_path) == taken
    assert notes() == [
        f"note: --input {tmp_path}: files that are read: 2; left out: 1 of a kind that is not read (old.zip), "
        "2 text (README.md, x.csv), 2 hidden (.git, .gitignore)"
    ]
    assert names(expand_inputs([f"{tmp_path}/**/*"], "data.train.mine"), tmp_path) == taken
    assert notes()[0].startswith(f"note: data.train.mine {tmp_path}/**/*: files that are read: 2; left out: 1 ")
    assert names(expand_inputs([tmp_path], kind="text"), tmp_path) == ["README.md", "x.csv"]
    assert names(expand_inputs([tmp_path], kind="all"), tmp_path) == sorted(["README.md", "x.csv", *taken])
    assert len(notes()) == 2
    assert names(expand_inputs([tmp_path / "README.md", tmp_path / data]), tmp_path) == ["README.md", data]
    assert notes() == []


def test_two_kinds_of_data_need_a_choice(tmp_path: Path) -> None:
    make_files(tmp_path, "a.parquet", "b.jsonl")
    with pytest.raises(UserError, match=r"holds Parquet files and JSON lines; .* as '\*\.parquet', or --kind parquet"):
        expand_inputs([tmp_path])
    with pytest.raises(UserError, match=r"holds Parquet files and JSON lines; .* as '\*\.parquet'$"):
        expand_inputs([tmp_path], "data.train.mine")
    assert names(expand_inputs([tmp_path], kind="jsonl"), tmp_path) == ["b.jsonl"]
    assert names(expand_inputs([tmp_path / "*.parquet"]), tmp_path) == ["a.parquet"]
    with pytest.raises(UserError, match=r"holds no file that is read; give .* \(found 1 jsonl \(b\.jsonl\), 1 parquet"):
        expand_inputs([tmp_path], kind="text")


def test_one_kind_at_a_url(memory: fsspec.AbstractFileSystem, notes: Callable) -> None:
    for name in ("a.parquet", "deep/b.PARQUET", "README.md", ".hidden/x.parquet", "y.json"):
        memory.pipe(f"/web/{name}", b"x")
    assert names(expand_inputs(["memory://web"]), "memory:///web") == ["a.parquet", "deep/b.PARQUET"]
    assert notes() == [
        "note: --input memory://web: files that are read: 2; left out: 1 of a kind that is not read (y.json), "
        "1 text (README.md), 1 hidden (.hidden/x.parquet)"
    ]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    """A link to a folder, two links to one folder, links to parent folders, to themselves, and to a file."""
    make_files(tmp_path / "elsewhere", "x.txt", "deep/y.txt")
    folder = make_files(tmp_path / "folder", "a.txt", "sub/b.txt")
    for link, target in (
        ("linked", "../elsewhere"), ("sub/again", "../../elsewhere/deep"), ("sub/up", ".."), ("up", ".."),
        ("self", "self"), ("c.txt", "../elsewhere/x.txt"),
    ):  # fmt: skip
        (folder / link).symlink_to(target)
    (folder / "self").unlink()
    expected = {(folder / name).resolve() for name in ("a.txt", "sub/b.txt", "linked/x.txt", "linked/deep/y.txt")}
    for inputs in (folder, f"{folder}/**/*", f"{folder}/**", f"{folder}/**/**/*.txt", f"{folder}/**/*.txt"):
        files = expand_inputs([inputs])
        assert {path.resolve() for path in files} == expected
        assert len(files) == 4
    assert names(expand_inputs([folder]), folder) == ["a.txt", "c.txt", "linked/deep/y.txt", "sub/b.txt"]
    assert {path.name for path in expand_inputs([f"{folder}/*/again/y.txt", f"{folder}/**/deep/*"])} == {"y.txt"}


def test_a_relative_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_files(tmp_path, "x/a.txt", "x/[b]/c.txt", "x/.h/d.txt", "x/y/.e.txt")
    monkeypatch.chdir(tmp_path)
    assert names(expand_inputs(["**/*.txt"]), ".") == ["x/[b]/c.txt", "x/a.txt"]
    assert names(expand_inputs(["x/y/.*"]), ".") == ["x/y/.e.txt"]
    assert names(expand_inputs(["x/../x/*.txt"]), ".") == ["x/../x/a.txt"]
    with pytest.raises(UserError, match="matches no file; check the pattern"):
        expand_inputs(["x/*.jsonl"])


def test_unreadable_paths_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: Callable) -> None:
    """A folder without permission, a link to a missing file, and a pipe."""
    make_files(tmp_path, "a.txt", "shut/b.txt")
    os.mkfifo(tmp_path / "pipe")
    expand_inputs([tmp_path])
    assert "1 pipe or device (pipe)" in notes()[0]
    (tmp_path / "c.txt").symlink_to("gone")
    for inputs in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(UserError, match=r"c\.txt is a link to a file that does not exist; mend the link"):
            expand_inputs([inputs])
    (tmp_path / "c.txt").unlink()
    listed = os.listdir

    def refuse(folder: Path) -> list[str]:
        if Path(folder).name == "shut":
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(find_files.os, "listdir", refuse)
    for inputs in (tmp_path, f"{tmp_path}/**/*.txt", f"{tmp_path}/*/*.txt"):
        with pytest.raises(PermissionError) as error:
            expand_inputs([inputs])
        assert explain(error.value) == (
            2, f"{tmp_path}/shut cannot be written or read (Permission denied); check its permissions"
        )  # fmt: skip


def test_a_file_named_twice_is_read_once(tmp_path: Path, tokenizer_dir: Path, notes: Callable) -> None:
    folder = make_files(tmp_path / "folder", "a.txt", "b.txt")
    (tmp_path / "link.txt").symlink_to(folder / "b.txt")
    inputs = [folder, folder / "a.txt", f"{folder}/*.txt", f"{folder}/../folder/b.txt", tmp_path / "link.txt"]
    index, _ = prepare_data(inputs, tokenizer_dir, tmp_path / "out")
    assert decode_documents(tmp_path / "out", tokenizer_dir) == ["a.txt", "b.txt"]
    assert [entry["name"] for entry in index["inputs"]] == ["a.txt", "b.txt"]
    assert "--input: named more than once and read once: 5 (" in notes()[0]
    assert names(expand_inputs([folder / "b.txt", folder]), folder) == ["b.txt", "a.txt"]
    assert TextSource(inputs, tokenizer_dir, cache=tmp_path / "cache").documents == 2


def test_a_url_named_twice_is_read_once(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe("/web/a.txt", b"x")
    inputs = ["memory://web", "memory://web/a.txt", "memory:///web/a.txt", "memory://web/*"]
    assert expand_inputs(inputs) == ["memory:///web/a.txt"]


def test_which_sources_hold_text(tmp_path: Path, tokenizer_dir: Path, memory: fsspec.AbstractFileSystem) -> None:
    """All inputs of prepare_data; not shards, complete or partial, nor a missing folder, which may become shards."""
    text = [
        make_files(tmp_path / "nested", "a/b/c.JSONL"), make_files(tmp_path / "code", "x/y.py", "index.json"),
        make_files(tmp_path / "lines", "a.ndjson"), make_files(tmp_path / "packed", "a.json.gz"),
        make_files(tmp_path, "one"),
    ]  # fmt: skip
    text[-1] = tmp_path / "one"
    assert all(map(holds_text, text))
    missing = ["a.jsonl", "a.JSON.GZ", "a.parquet", "a.txt", "some/*", "s3://b/a.jsonl", "s3://b/x/*.json.gz"]
    assert all(map(holds_text, missing))
    write_jsonl(tmp_path / "a.jsonl", ["a text"])
    prepare_data([tmp_path / "a.jsonl"], tokenizer_dir, tmp_path / "shards")
    make_files(tmp_path / "shards", "README.md")
    make_files(tmp_path / "no-index", "shard_00000.documents", "README.md")
    make_files(tmp_path / "begun", "README.md")
    (tmp_path / "begun" / "progress.json").write_text('{"shards": []}')
    make_files(tmp_path / "nothing", "a.zip")
    shards = ["shards", "no-index", "begun", "nothing", "missing"]
    assert not any(holds_text(tmp_path / name) for name in shards)
    assert not holds_text(f"file://{tmp_path}/shards")
    assert holds_text(f"file://{tmp_path}/nested")
    memory.put(f"{tmp_path}/shards/", "/prepared", recursive=True)
    memory.pipe("/web/deep/a.jsonl", b'{"text": "a"}')
    assert (holds_text("memory://prepared"), holds_text("memory://web")) == (False, True)


def test_files_without_text_are_reported(tmp_path: Path, tokenizer_dir: Path, notes: Callable) -> None:
    write_jsonl(tmp_path / "b.jsonl", ["a text"])
    for name, content in (("a.jsonl", ""), ("c.jsonl", "\n\n"), ("d.jsonl", '{"text": ""}\n')):
        (tmp_path / name).write_text(content)
    expected = [f"note: files without any text: 3 of 4 ({tmp_path}/a.jsonl, {tmp_path}/c.jsonl, "
              f"{tmp_path}/d.jsonl)"]  # fmt: skip
    prepare_data([tmp_path], tokenizer_dir, tmp_path / "out" / "shards")
    assert notes() == expected
    TextSource([f"{tmp_path}/*.jsonl"], tokenizer_dir, cache=tmp_path / "cache")
    assert notes() == expected
