"""The text of one document at a known place of a file: by seeking, never by reading what stands before it.

Text and .jsonl files are mapped into memory; of Parquet files a few row groups are kept decoded, since a row cannot be
read without its group. A file is looked at before each read: one that has changed since it was indexed is refused.
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
from trinity.data.sources.file_kinds import readable_kind
from trinity.data.sources.text_index import stamp
from trinity.errors import UserError

OPEN_FILES = 64
ROW_GROUP_BYTES = 256 << 20

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """What was used last, as much of it as fits, but at least one thing however large it is."""

    def __init__(self, limit: int) -> None:
        """Hold things whose sizes sum to at most `limit`, in any unit."""
        self._limit, self._size = limit, 0
        self._things: dict[Key, tuple[Value, int]] = {}  # the oldest first

    def get(self, key: Key) -> Value | None:
        """The thing, which becomes the latest, or None."""
        if key not in self._things:
            return None
        found = self._things[key] = self._things.pop(key)
        return found[0]

    def put(self, key: Key, thing: Value, size: int) -> None:
        """Add a thing that is not there, and let go of the oldest ones."""
        assert key not in self._things
        self._things[key] = thing, size
        self._size += size
        while self._size > self._limit and len(self._things) > 1:
            _, gone = self._things.pop(next(iter(self._things)))
            self._size -= gone


class TextReader:
    """Documents of some files by place. One thread at a time; after a fork each process goes on by itself."""

    def __init__(self, files: list[Path], stamps: list[tuple[int, int]], field: str) -> None:
        """Open nothing yet.

        Args:
            files: of any kind that is read, and not packed.
            stamps: of the files when they were indexed.
            field: name of the text in a JSON line or Parquet row.
        """
        self._files, self._stamps, self._field = files, stamps, field
        self._open: Recent[int, mmap.mmap | _RowGroups] = Recent(OPEN_FILES)
        self._groups: Recent[tuple[int, int], pyarrow.ChunkedArray] = Recent(ROW_GROUP_BYTES)

    def text(self, file: int, place: int) -> str:
        """A document's text.

        Args:
            file: number of its file.
            place: byte in the file at which it begins, or row.
        Raises:
            UserError: the file has changed since it was indexed.
        """
        path = self._files[file]
        self._check(file)
        kind = readable_kind(path).name
        if kind == "parquet":
            return self._row(file, place)
        content = self._opened(file, _mapped)
        if kind == "text":
            return parse_text(content[:], str(path), 1, 0, self._field)
        end = content.find(b"\n", place)
        line = content[place:] if end < 0 else content[place:end]
        return parse_line(line, str(path), 1, place, self._field)

    def _check(self, file: int) -> None:
        path = self._files[file]
        try:
            same = stamp(path) == self._stamps[file]
        except FileNotFoundError:
            same = False
        if not same:
            raise UserError(f"{path} has changed since this run indexed it; put it back, or start again")

    def _opened(self, file: int, opener: Callable) -> "mmap.mmap | _RowGroups":
        opened = self._open.get(file)
        if opened is None:
            opened = opener(self._files[file])
            self._open.put(file, opened, 1)
        return opened

    def _row(self, file: int, row: int) -> str:
        parquet = self._opened(file, _RowGroups)
        group, within = parquet.locate(row)
        column = self._groups.get((file, group))
        if column is None:
            column = parquet.column(group, self._field)
            self._groups.put((file, group), column, column.nbytes)
        return column[within].as_py()


class _RowGroups:
    """An open Parquet file."""

    def __init__(self, path: Path) -> None:
        self._file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        metadata = self._file.metadata
        self._first = [0, *accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))]

    def locate(self, row: int) -> tuple[int, int]:
        """(row group, row in it)."""
        group = bisect_right(self._first, row) - 1
        return group, row - self._first[group]

    def column(self, group: int, field: str) -> pyarrow.ChunkedArray:
        # Without threads: a process that was forked has none of the pool that its parent made.
        return self._file.read_row_group(group, columns=[field], use_threads=False).column(field)


def _mapped(path: Path) -> mmap.mmap:
    # Unlike an open file, a map has no position that forked processes would share.
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
