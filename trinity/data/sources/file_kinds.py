"""What kind of documents a file holds, by the ending of its name, without regard to case.

    text      one document: every file whose ending is not named here
    jsonl     a document a line: .jsonl, .ndjson; packed also .json, which is how large corpora lie
    parquet   a document a row: .parquet

Lines may be packed (.gz, .zst, .bz2, .xz). A .json file that is not packed is mostly one value over many lines, such as
a description of the other files, so it is not read.
"""

from pathlib import Path
from typing import Literal, NamedTuple

from trinity.errors import UserError

KINDS = ("parquet", "jsonl", "text")
ALL = "all"
CHOICES = (*KINDS, ALL)
"""What --kind may be."""

PACKINGS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bzip2", ".xz": "xz"}
LINES = (".jsonl", ".ndjson")
PACKED_LINES = (*LINES, ".json")
NOT_READ = (".json", ".zip", ".tar", ".tgz", ".7z", ".pdf", ".tmp", ".tokens", ".documents", ".hashes", *PACKINGS)
READ = "plain text, .jsonl or .ndjson (also as .gz, .zst, .bz2, .xz), .json.gz, .json.zst or .parquet"


class FileKind(NamedTuple):
    """What a file holds, and how it is packed: gzip, zstd, bzip2, xz or not at all."""

    name: Literal["text", "jsonl", "parquet"]
    packing: str | None = None


def file_kind(path: Path | str) -> FileKind | None:
    """The kind of a file by its name, None for one that is not read."""
    name = file_name(path).lower()
    for ending, packing in PACKINGS.items():
        if name.endswith(ending):
            lines = name.removesuffix(ending).endswith(PACKED_LINES)
            return FileKind("jsonl", packing) if lines else None
    if name.endswith(LINES):
        return FileKind("jsonl")
    if name.endswith(".parquet"):
        return FileKind("parquet")
    return None if name.endswith(NOT_READ) else FileKind("text")


def readable_kind(path: Path | str) -> FileKind:
    """The kind of a file that is to be read.

    Raises:
        UserError: it is not read.
    """
    kind = file_kind(path)
    if kind is None:
        hint = "; rename it to .jsonl if each of its lines is an object" if str(path).lower().endswith(".json") else ""
        raise UserError(f"{path} is of a kind that is not read; give {READ}{hint}")
    return kind


def file_name(path: Path | str) -> str:
    """The last part of a path or URL, without what a web address has after ? or #."""
    text = str(path)
    if text.startswith(("http://", "https://")):
        text = text.partition("#")[0].partition("?")[0]
    return text.rpartition("/")[2]
