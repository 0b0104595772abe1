"""Bytes of text per token of a tokenizer, by file or language, in comparison with other tokenizers.

More bytes per token mean fewer tokens for the same text: shorter sequences, cheaper training. BOS is not counted, and a
special token that a document spells out counts as text.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from trinity.data.sources.documents import read_documents, read_with_progress
from trinity.data.sources.file_formats import readable_kind
from trinity.data.sources.find_files import Paths
from trinity.data.sources.inputs import expand_inputs
from trinity.data.tokenizer.tokenizer import load_text_encoder
from trinity.errors import UserError

BATCH_CHARACTERS = 1 << 20
ALL = "all"


class Row(NamedTuple):
    """One group of documents.

    label: file name or value of the grouping field; "all" for the sum.
    documents, text_bytes: their number and their UTF-8 bytes.
    tokens: by tokenizer, the reported one first.
    """

    label: str
    documents: int
    text_bytes: int
    tokens: list[int]

    @property
    def bytes_per_token(self) -> list[float]:
        """By tokenizer; 0 for a group without text."""
        return [self.text_bytes / count if count else 0.0 for count in self.tokens]

    @property
    def ratios(self) -> list[float]:
        """Bytes per token of the reported tokenizer over those of each other one; above 1 it needs fewer tokens."""
        return [other / self.tokens[0] if self.tokens[0] else 0.0 for other in self.tokens[1:]]


def tokenizer_report(
    tokenizers: list[Path],
    inputs: Sequence[Path | str],
    *,
    field: str = "text",
    kind: str | None = None,
    group_by: str | None = None,
    progress: bool = False,
) -> list[Row]:
    """Count the tokens of the files' documents.

    Args:
        tokenizers: folders with tokenizer.json, the reported one first.
        inputs: files, folders, patterns and URLs, as for prepare_data.
        field: name of the text in a JSON line or Parquet row.
        kind: of files in folders and of patterns, if they are mixed (see expand_inputs).
        group_by: name of the field to group by; None groups by file name. A text file is always grouped by its name.
        progress: draw a bar on stderr.
    Returns:
        A row for each group, in order of first appearance, then the row "all".
    Raises:
        UserError: bad files (see read_documents), a document without `group_by`, or a tokenizer that cannot be read.
    """
    files = expand_inputs([*inputs], "FILES", kind)
    toks = [load_text_encoder(folder) for folder in tokenizers]
    documents: Counter[str] = Counter()
    text_bytes: Counter[str] = Counter()
    tokens: dict[str, list[int]] = defaultdict(lambda: [0] * len(toks))
    for label, texts in _batches(_labelled(files, field, group_by, progress)):
        documents[label] += len(texts)
        text_bytes[label] += sum(len(text.encode()) for text in texts)
        tokens[label] = [before + _count(tok, texts) for before, tok in zip(tokens[label], toks)]
    rows = [Row(label, documents[label], text_bytes[label], tokens[label]) for label in documents]
    sums = [sum(column) for column in zip(*tokens.values())] or [0] * len(toks)
    return [*rows, Row(ALL, documents.total(), text_bytes.total(), sums)]


def as_text(rows: list[Row], names: list[str]) -> str:
    """The rows as a table.

    Args:
        rows: of tokenizer_report.
        names: of the tokenizers, the reported one first.
    """
    head = ["", "documents", "bytes", *(f"{name} B/token" for name in names), *(f"over {name}" for name in names[1:])]
    body = [
        [
            row.label,
            f"{row.documents:,}",
            f"{row.text_bytes:,}",
            *(f"{number:.3f}" for number in row.bytes_per_token),
            *(f"{number:.3f}" for number in row.ratios),
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *body)]
    lines = [[cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])] for cells in (head, *body)]
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def as_values(rows: list[Row], names: list[str]) -> dict:
    """The rows for a program: the tokenizers' names, and lists in their order."""
    return {
        "tokenizers": names,
        "rows": [{**row._asdict(), "bytes_per_token": row.bytes_per_token, "ratios": row.ratios} for row in rows],
    }


def _labelled(files: Paths, field: str, group_by: str | None, progress: bool) -> Iterator[tuple[str, str]]:
    """(label, text) of each document with text."""
    names = [Path(str(path)).name for path in files]
    if len(set(names)) < len(names):
        names = [str(path) for path in files]
    labels = iter(()) if group_by is None else _values(files, group_by)
    for document, label in zip_longest(read_with_progress(files, field, "counting", progress), labels):
        if document.text:
            yield label or names[document.place.file], document.text


def _values(files: Paths, group_by: str) -> Iterator[str | None]:
    """The value of another field of each document; None for a text file, which has no fields."""
    try:
        for document in read_documents(files, group_by):
            has_fields = readable_kind(files[document.place.file]).name != "text"
            yield document.text if has_fields else None
    except UserError as error:
        raise UserError(f"--group-by {group_by}: {error}") from None


def _batches(labelled: Iterator[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """(label, its texts), about a megabyte at a time: the library encodes many texts on all cores."""
    waiting: dict[str, list[str]] = defaultdict(list)
    size = 0
    for label, text in labelled:
        waiting[label].append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield from waiting.items()
            waiting.clear()
            size = 0
    yield from waiting.items()


def _count(tok: Tokenizer, texts: list[str]) -> int:
    return sum(len(encoding) for encoding in tok.encode_batch_fast(texts, add_special_tokens=False))
