"""Input files as documents, one after the other, from any point on.

A text file is one document; a line of .jsonl or .jsonl.gz and a row of .parquet are one each. A document's place is
(file, item): the number of the file, and of the line or row in it. Reading can start at any place, which is all that
a preparation that was killed has to remember. What stands before it in its file is read past, not parsed.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from trinity.errors import UserError

ROWS = 1024
NOT_TEXT = (".json", ".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".pdf")


class Place(NamedTuple):
    """Where a document stands: the number of its file, and of its line or row, both from 0."""

    file: int
    item: int


BEGINNING = Place(0, 0)


class Document(NamedTuple):
    """One document of the input.

    text: its text, maybe empty; None if it cannot be read and bad ones are skipped.
    place: where it stands.
    bytes_read: bytes of all input files up to its end, for progress (compressed bytes where they are compressed).
    """

    text: str | None
    place: Place
    bytes_read: int


class _Item(NamedTuple):
    """A line, row or file not yet parsed: content, where it begins in the file, and the file's bytes up to its end."""

    raw: bytes | str | None
    offset: int
    bytes_read: int


def read_documents(
    files: list[Path], field: str = "text", start: Place = BEGINNING, skip_bad: bool = False
) -> Iterator[Document]:
    """Yield the documents of the files in order, empty ones too.

    Args:
        files: existing files.
        field: name of the text in a JSON object or a Parquet row.
        start: the first document to yield.
        skip_bad: yield text None for a document that cannot be read, instead of raising.
    Raises:
        UserError: a file of unknown kind or broken packing; invalid UTF-8, broken JSON, or no text under `field`.
    """
    before = 0
    for number, path in enumerate(files):
        if number >= start.file:
            items, parse = _kind(path)
            first = start.item if number == start.file else 0
            for index, item in enumerate(items(path, field)):
                if index < first:
                    continue
                try:
                    text = _checked(parse(item, path, index, field), path, index)
                except UserError:
                    if not skip_bad:
                        raise
                    text = None
                yield Document(text, Place(number, index), before + item.bytes_read)
        before += path.stat().st_size


def _kind(path: Path) -> tuple[Callable, Callable]:
    """(what yields a file's items, what parses one), by the end of the file's name."""
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _lines, _parse_line
    if path.suffix == ".parquet":
        return _rows, _parse_row
    if path.suffix in NOT_TEXT:
        raise UserError(f"{path} is of a kind that is not read; give plain text, .jsonl, .jsonl.gz or .parquet")
    return _whole, _parse_text


def _whole(path: Path, field: str) -> Iterator[_Item]:
    raw = path.read_bytes()
    yield _Item(raw, 0, len(raw))


def _lines(path: Path, field: str) -> Iterator[_Item]:
    packed = path.suffix == ".gz"
    offset = 0
    try:
        with open(path, "rb") as file, gzip.open(file) if packed else nullcontext(file) as lines:
            for line in lines:
                yield _Item(line, offset, file.tell() if packed else offset + len(line))
                offset += len(line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}); copy it again") from None


def _rows(path: Path, field: str) -> Iterator[_Item]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                known = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path} has no column {field}; set --field to one of: {known}")
            rows, size, done = file.metadata.num_rows, path.stat().st_size, 0
            for batch in file.iter_batches(ROWS, columns=[field]):
                for value in batch.column(0):
                    done += 1
                    yield _Item(value.as_py(), 0, size * done // rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a whole Parquet file ({error}); copy it again") from None


def _parse_text(item: _Item, path: Path, index: int, field: str) -> str:
    try:
        return item.raw.decode()
    except UnicodeDecodeError as error:
        at = item.offset + error.start
        raise UserError(f"{path} is not valid UTF-8 at byte {at}; convert it, or leave it out") from None


def _parse_line(item: _Item, path: Path, index: int, field: str) -> str:
    text = _parse_text(item, path, index, field)
    if not text.strip():
        return ""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{index + 1} is not valid JSON ({error}); mend it, or give --skip-bad-lines") from None
    if not isinstance(value, dict) or field not in value:
        known = ", ".join(value) if isinstance(value, dict) else "none, the line is no object"
        raise UserError(f"{path}:{index + 1} has no field {field} (fields: {known}); set --field to the text's name")
    return value[field]


def _parse_row(item: _Item, path: Path, index: int, field: str) -> str:
    return item.raw


def _checked(text: object, path: Path, index: int) -> str:
    where = f"{path}:{index + 1}"
    if not isinstance(text, str):
        raise UserError(f"{where} holds {type(text).__name__} where text should be; mend it, or set --field")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which is no character and has no UTF-8.
        raise UserError(f"{where} holds half a surrogate pair at character {error.start}; mend it") from None
    return text
