"""Input files of every kind, and a remote file system in memory."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from tests.data.small_files import TEXTS, compress_zstd, write_jsonl


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """An empty file system with the URL memory://."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Every kind that is read, and some that are not, in two levels of folders."""
    folder = tmp_path / "folder"
    (folder / "b" / "deep").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", TEXTS[:10])
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (folder / "b" / "a.jsonl.gz").write_bytes(gzip.compress("".join(lines[10:20]).encode()))
    (folder / "b" / "deep" / "x.txt").write_text(TEXTS[20])
    (folder / "b" / "z.jsonl.zst").write_bytes(compress_zstd("".join(lines[21:30]).encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[30:]}), folder / "c.parquet")
    for name in (".hidden.txt", "b/x.zip", "b/y.json", "b/part.jsonl.tmp", "b/z.gz"):
        (folder / name).write_bytes(b"\xff")
    return folder
