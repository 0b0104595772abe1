"""Read input files as documents, one after the other, from any position on.

A text file is one document; a line of .jsonl and a row of .parquet are one each (file_formats.py). A document's
position is (file, item): the number of the file, and of the line or row in it. Reading can start at any position, so
a killed preparation has to store nothing else. Items before it in its file are read, not parsed.

Reading and parsing are separate: read_batches yields raw items, some hundred kilobytes at once, and texts parses them,
maybe in another process. read_documents does both.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow
import pyarrow.parquet

from trinity.data.sources.file_formats import damage_as_user_error, decompressed, readable_kind
from trinity.data.sources.find_files import Paths, names, note
from trinity.errors import UserError
from trinity.io.remote import file_size, open_input
from trinity.terminal import Progress

FIELD = "--field of prepare_data.py or evaluate.py (data.text_field in a config, text_field in DAM.yaml)"
BATCH_BYTES = 1 << 18
BYTE_ORDER_MARK = "\ufeff"
WHOLE_ROWS = 64
"""Rows of a Parquet file that are read at once where they are read whole."""


ItemKind = Literal["text", "line", "value"]


class Position(NamedTuple):
    """A document's position: the number of its file, and of its line or row, both from 0."""

    file: int
    item: int


BEGINNING = Position(0, 0)


class Document(NamedTuple):
    """One document of the input.

    text: its text, maybe empty; None if it cannot be read and bad ones are skipped.
    position: of the document.
    bytes_read: bytes of all input files read so far, for progress (compressed bytes of compressed files).
    offset: its beginning in its file: the line's first byte, in the decompressed file if it is compressed; the row's
        number in a Parquet file; 0 in a text file.
    """

    text: str | None
    position: Position
    bytes_read: int
    offset: int


class RawBatch(NamedTuple):
    """Consecutive raw items of one input, not yet parsed.

    name: the input, for messages.
    position: position of the first item.
    offset: beginning of the first item (see Document.offset).
    kind: of the items: a whole text file or a line, as bytes; or a row's value, of any type.
    items: at least one.
    done: amount of all inputs read after this batch: bytes of files, or rows of a dataset.
    """

    name: str
    position: Position
    offset: int
    kind: ItemKind
    items: list[Any]
    done: int

    @property
    def size(self) -> int:
        """Bytes or characters of the items."""
        return sum(len(item) if isinstance(item, bytes | str) else 1 for item in self.items)

    def offsets(self) -> Iterator[int]:
        """Beginning of each item (see Document.offset)."""
        if self.kind == "value":
            return iter(range(self.offset, self.offset + len(self.items)))
        return accumulate(map(len, self.items[:-1]), initial=self.offset)


def read_documents(
    files: Paths, field: str = "text", start: Position = BEGINNING, skip_bad: bool = False
) -> Iterator[Document]:
    """Yield the documents of the files in order, empty ones too.

    Args:
        files: existing files.
        field: name of the text in a JSON object or a Parquet row.
        start: the first document to yield.
        skip_bad: yield text None for a document that cannot be read, instead of raising.
    Raises:
        UserError: a file of unknown kind or damaged; invalid UTF-8, broken JSON, or no text under `field`.
    """
    for batch in read_batches(files, field, start):
        file, first = batch.position
        for item, (text, offset) in enumerate(zip(texts(batch, field, skip_bad), batch.offsets()), first):
            yield Document(text, Position(file, item), batch.done, offset)


def read_with_progress(files: Paths, field: str, title: str, show: bool, note_empty: bool = True) -> Iterator[Document]:
    """read_documents with a progress bar on stderr.

    Args:
        title: of the bar.
        show: draw the bar.
        note_empty: at the end, name the files without text on stderr.
    """
    counts = [0] * len(files)
    with Progress(title, sum(map(file_size, files)), "B", show, scaled=True) as progress:
        for document in read_documents(files, field):
            counts[document.position.file] += bool(document.text)
            yield document
            progress.update_to(document.bytes_read)
    if note_empty:
        note_empty_files(files, counts)


def note_empty_files(files: Paths, counts: Sequence[int]) -> None:
    """Name the files without text on stderr.

    Args:
        files: that were read.
        counts: documents with text in each of the first files; the files after them have none.
    """
    counts = [*counts, *[0] * (len(files) - len(counts))]
    empty = [path for path, count in zip(files, counts) if not count]
    if empty and len(empty) < len(files):  # where all are empty, the caller raises an error
        note(f"files without any text: {len(empty):,} of {len(files):,} ({names(empty)})")


def read_batches(files: Paths, field: str | None, start: Position = BEGINNING) -> Iterator[RawBatch]:
    """Yield the raw items of the files in order, in batches of about BATCH_BYTES.

    Args:
        files: existing files.
        field: name of a Parquet file's column; None: a Parquet file's values are whole rows, as dictionaries.
        start: the first item to yield.
    Raises:
        UserError: a file of unknown kind, damaged, or without a column `field`.
    """
    before = 0
    for number, path in enumerate(files):
        if number >= start.file:
            kind, read = _reader(path)
            item = offset = 0
            for items, done in read(path, field):
                batch = RawBatch(str(path), Position(number, item), offset, kind, items, before + done)
                item += len(items)
                offset += len(items) if kind == "value" else sum(map(len, items))
                if (number, item) > start:
                    yield _from(batch, start)
        before += file_size(path)


def texts(batch: RawBatch, field: str, skip_bad: bool) -> Iterator[str | None]:
    """The text of each item, None for one that cannot be read.

    Raises:
        UserError: an item that cannot be read, unless `skip_bad`.
    """
    parse = {"text": parse_text, "line": parse_line, "value": _checked}[batch.kind]
    for number, (item, offset) in enumerate(zip(batch.items, batch.offsets()), batch.position.item + 1):
        try:
            text = parse(item, batch.name, number, offset, field)
        except UserError:
            if not skip_bad:
                raise
            text = None
        yield text


def _from(batch: RawBatch, start: Position) -> RawBatch:
    """The batch without the items before `start`."""
    late = start.item - batch.position.item if batch.position < start else 0
    if not late:
        return batch
    offset = list(batch.offsets())[late]
    return batch._replace(position=start, offset=offset, items=batch.items[late:])


def _reader(path: Path | str) -> tuple[ItemKind, Callable[[Path | str, str | None], Iterator[tuple[list[Any], int]]]]:
    """The kind of a file's items, and the function that reads them in batches, each with the bytes read so far."""
    kind = readable_kind(path).name
    if kind == "text":
        return "text", _read_text
    return ("line", _lines) if kind == "jsonl" else ("value", _rows)


def _read_text(path: Path | str, field: str | None) -> Iterator[tuple[list[bytes], int]]:
    with open_input(path) as file:
        raw = file.read()
    yield [raw], len(raw)


def _lines(path: Path | str, field: str | None) -> Iterator[tuple[list[bytes], int]]:
    compression = readable_kind(path).compression
    with open_input(path) as file, damage_as_user_error(path, compression):
        lines = decompressed(file, compression)
        while items := lines.readlines(BATCH_BYTES):
            yield items, file.tell()


def _rows(path: Path | str, field: str | None) -> Iterator[tuple[list[Any], int]]:
    with open_input(path) as raw, damage_as_user_error(path, "Parquet"), pyarrow.parquet.ParquetFile(raw) as file:
        names = file.schema_arrow.names
        if field is not None and field not in names:
            raise UserError(f"{path} has no column {field}; set {FIELD} to one of: {', '.join(names)}")
        rows, size, done = file.metadata.num_rows, file_size(path), 0
        count, columns = (WHOLE_ROWS, None) if field is None else (_rows_at_once(file.metadata, field), [field])
        for values in file.iter_batches(count, columns=columns):
            done += len(values)
            yield values.to_pylist() if field is None else _values(values.column(0)), size * done // rows


def _values(column: pyarrow.Array) -> list[Any]:
    """The rows of a column; text that is not UTF-8 stays bytes, which parsing refuses with the row's number."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decoded(raw) for raw in column.cast(pyarrow.binary()).to_pylist()]


def _decoded(raw: bytes | None) -> str | bytes | None:
    try:
        return raw.decode() if raw is not None else None
    except UnicodeDecodeError:
        return raw


def _rows_at_once(metadata: pyarrow.parquet.FileMetaData, field: str) -> int:
    """Rows of about BATCH_BYTES, at most 1024: a thousand web pages fit into memory, a thousand books may not."""
    paths = [metadata.schema.column(column).path for column in range(metadata.num_columns)]
    if field not in paths:
        return 1  # a list or a structure, which parsing refuses
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    column = paths.index(field)
    widest = max((g.column(column).total_uncompressed_size / max(g.num_rows, 1) for g in groups), default=1)
    return int(min(max(BATCH_BYTES / max(widest, 1), 1), 1024))


def parse_text(item: bytes, name: str, number: int, offset: int, field: str) -> str:
    """The text of a text file, without a byte order mark, which states the encoding and is no text.

    Args:
        item: the file's content.
        name: the file, for messages.
        number, offset, field: of a line or row: number from 1, beginning in the file, and name of the text.
    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return item.decode().removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise UserError(f"{name} is not valid UTF-8 at byte {at}; convert it, or leave it out") from None


def parse_line(item: bytes, name: str, number: int, offset: int, field: str) -> str:
    """The text in a line of JSON; an empty line has an empty text. Arguments as in parse_text.

    Raises:
        UserError: the line is no object with a text of that name.
    """
    text = parse_text(item, name, number, offset, field)
    if not text.strip():
        return ""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{name}:{number} is not valid JSON ({error}); fix it, or prepare shards with --skip-bad-lines"
        ) from None
    if not isinstance(value, dict) or field not in value:
        known = ", ".join(value) if isinstance(value, dict) else "none, the line is no object"
        raise UserError(f"{name}:{number} has no field {field} (fields: {known}); set {FIELD} to the text's name")
    return _checked(value[field], name, number, offset, field)


def _checked(value: Any, name: str, number: int, offset: int, field: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{name}:{number} holds {type(value).__name__} where text should be; fix it, or set {FIELD}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which is no character and has no UTF-8.
        raise UserError(f"{name}:{number} holds half a surrogate pair at character {error.start}; fix it") from None
    return value.removeprefix(BYTE_ORDER_MARK)  # of the file that the text came from
