"""Read one document at a known offset of a file, without reading the documents before it.

Text and .jsonl files are mapped into memory; of Parquet files a few row groups are kept decoded, since a row cannot be
read without its group. Each read checks the file first: one that has changed since it was indexed is refused.
"""

import mmap
from bisect import bisect_right
from collections.abc import Callable, Hashable
from itertools import accumulate
from pathlib import Path
from typing import Generic, TypeVar

import pyarrow
import pyarrow.parquet

from trinity.data.sources.documents import parse_line, parse_text
from trinity.data.sources.file_formats import readable_kind
from trinity.data.sources.text_index import stamp
from trinity.errors import UserError

OPEN_FILES = 64
"""Of each kind: maps, and Parquet files."""
ROW_GROUP_BYTES = 256 << 20

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LRUCache(Generic[Key, Value]):
    """The most recently used values, up to a total size, but at least one value of any size."""

    def __init__(self, limit: int) -> None:
        """`limit`: the total size, in any unit."""
        self._limit, self._size = limit, 0
        self._values: dict[Key, tuple[Value, int]] = {}  # the least recently used first

    def get(self, key: Key) -> Value | None:
        """The value, which becomes the most recently used, or None."""
        if key not in self._values:
            return None
        entry = self._values[key] = self._values.pop(key)
        return entry[0]

    def put(self, key: Key, value: Value, size: int) -> None:
        """Add a value under a new key, and drop the least recently used ones."""
        assert key not in self._values
        self._values[key] = value, size
        self._size += size
        while self._size > self._limit and len(self._values) > 1:
            _, dropped = self._values.pop(next(iter(self._values)))
            self._size -= dropped


class TextReader:
    """Reads documents of some files by offset. One thread at a time; usable in both processes after a fork."""

    def __init__(self, files: list[Path], stamps: list[tuple[int, int]], field: str) -> None:
        """Files are opened on first use.

        Args:
            files: of any kind that is read, not compressed.
            stamps: of the files when they were indexed.
            field: name of the text in a JSON line or Parquet row.
        """
        self._files, self._stamps, self._field = files, stamps, field
        self._maps: LRUCache[int, mmap.mmap] = LRUCache(OPEN_FILES)
        self._parquet: LRUCache[int, _ParquetFile] = LRUCache(OPEN_FILES)
        self._groups: LRUCache[tuple[int, int], pyarrow.ChunkedArray] = LRUCache(ROW_GROUP_BYTES)

    def text(self, file: int, offset: int) -> str:
        """A document's text.

        Args:
            file: number of its file.
            offset: its first byte in the file, or its row.
        Raises:
            UserError: the file has changed since it was indexed.
        """
        path = self._files[file]
        self._check(file)
        kind = readable_kind(path).name
        if kind == "parquet":
            return self._row(file, offset)
        content = _opened(self._maps, file, lambda: _mapped(path))
        if kind == "text":
            return parse_text(content[:], str(path), 1, 0, self._field)
        end = content.find(b"\n", offset)
        line = content[offset:] if end < 0 else content[offset:end]
        return parse_line(line, str(path), 1, offset, self._field)

    def _check(self, file: int) -> None:
        path = self._files[file]
        try:
            same = stamp(path) == self._stamps[file]
        except FileNotFoundError:
            same = False
        if not same:
            raise UserError(f"{path} has changed since this run indexed it; put it back, or start again")

    def _row(self, file: int, row: int) -> str:
        parquet = _opened(self._parquet, file, lambda: _ParquetFile(self._files[file]))
        group, within = parquet.locate(row)
        column = self._groups.get((file, group))
        if column is None:
            column = parquet.column(group, self._field)
            self._groups.put((file, group), column, column.nbytes)
        return column[within].as_py()


def _opened(cache: LRUCache[int, Value], file: int, opener: Callable[[], Value]) -> Value:
    opened = cache.get(file)
    if opened is None:
        opened = opener()
        cache.put(file, opened, 1)
    return opened


class _ParquetFile:
    """An open Parquet file, read by row group."""

    def __init__(self, path: Path) -> None:
        self._file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        metadata = self._file.metadata
        self._first = [0, *accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))]

    def locate(self, row: int) -> tuple[int, int]:
        """(row group, row in it)."""
        group = bisect_right(self._first, row) - 1
        return group, row - self._first[group]

    def column(self, group: int, field: str) -> pyarrow.ChunkedArray:
        # Without threads: a forked process has none of its parent's thread pool.
        return self._file.read_row_group(group, columns=[field], use_threads=False).column(field)


def _mapped(path: Path) -> mmap.mmap:
    # Unlike an open file, a map has no file position, which forked processes would share.
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
