"""The format of an input file, by the ending of its name, without regard to case; and the content of compressed files.

    text      one document: every file whose ending is not named here
    jsonl     a document a line: .jsonl, .ndjson; compressed also .json, the usual form of large corpora
    parquet   a document a row: .parquet

Lines may be compressed by gzip, zstd, bzip2 or xz (.gz, .zst, .bz2, .xz). A .json file that is not compressed is mostly
one value over many lines, such as a description of the other files, so it is not read.
"""

import bz2
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, cast

import pyarrow

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from trinity.errors import UserError
from trinity.io.local import atomic_file, file_lock
from trinity.io.remote import open_input

KINDS = ("parquet", "jsonl", "text")
ALL = "all"
CHOICES = (*KINDS, ALL)
"""Values of --kind."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bzip2", ".xz": "xz"}
LINES = (".jsonl", ".ndjson")
COMPRESSED_LINES = (*LINES, ".json")
NOT_READ = (
    ".json",
    ".zip",
    ".tar",
    ".tgz",
    ".7z",
    ".pdf",
    ".tmp",
    ".tokens",
    ".documents",
    ".mask",
    ".hashes",
    *COMPRESSIONS,
)
READ = "plain text, .jsonl or .ndjson (also as .gz, .zst, .bz2, .xz), .json.gz, .json.zst or .parquet"

BLOCK = 1 << 18
# zstd --long=31 refers back up to 2 GiB, and so must the reader; the library's default limit is 128 MiB.
ZSTD: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}


class FileKind(NamedTuple):
    """The format of the documents in a file, and its compression: gzip, zstd, bzip2, xz or None."""

    name: Literal["text", "jsonl", "parquet"]
    compression: str | None = None


def file_kind(path: Path | str) -> FileKind | None:
    """The kind of a file by its name, None for one that is not read."""
    name = file_name(path).lower()
    for ending, compression in COMPRESSIONS.items():
        if name.endswith(ending):
            lines = name.removesuffix(ending).endswith(COMPRESSED_LINES)
            return FileKind("jsonl", compression) if lines else None
    if name.endswith(LINES):
        return FileKind("jsonl")
    if name.endswith(".parquet"):
        return FileKind("parquet")
    return None if name.endswith(NOT_READ) else FileKind("text")


def readable_kind(path: Path | str) -> FileKind:
    """The kind of a file.

    Raises:
        UserError: its kind is not read.
    """
    kind = file_kind(path)
    if kind is None:
        hint = "; rename it to .jsonl if each of its lines is an object" if str(path).lower().endswith(".json") else ""
        raise UserError(f"{path} is of a kind that is not read; give {READ}{hint}")
    return kind


def file_name(path: Path | str) -> str:
    """The last part of a path or URL, without a web address's query and fragment."""
    text = str(path)
    if text.startswith(("http://", "https://")):
        text = text.partition("#")[0].partition("?")[0]
    return text.rpartition("/")[2]


def decompressed(file: BinaryIO, compression: str | None) -> BinaryIO:
    """The content of an open file.

    Args:
        file: open for reading; it stays open when the content is closed.
        compression: gzip, zstd, bzip2 or xz; None returns the file.
    """
    if compression == "gzip":
        return cast(BinaryIO, gzip.open(file))  # a BinaryIO in all but its declaration, as bz2's and lzma's
    if compression == "zstd":
        return io.BufferedReader(zstd.ZstdFile(file, options=ZSTD), BLOCK)
    if compression == "bzip2":
        return cast(BinaryIO, bz2.open(file))
    if compression == "xz":
        return cast(BinaryIO, lzma.open(file))
    return file


@contextmanager
def damage_as_user_error(path: Path | str, file_format: str | None) -> Iterator[None]:
    """Turn a library's error about a truncated or damaged file into one sentence.

    Args:
        path: the file that is read in the block.
        file_format: its compression or "Parquet"; None re-raises every error.
    Raises:
        UserError: the file is truncated or damaged.
    """
    try:
        yield
    except (EOFError, zlib.error, zstd.ZstdError, lzma.LZMAError, pyarrow.ArrowException, OSError) as error:
        if file_format is None or getattr(error, "errno", None):  # an error of the disk, not of the content
            raise
        raise UserError(f"{path} is not a whole {file_format} file ({error}); copy it again") from None


def decompress_file(path: Path, compression: str, target: Path) -> None:
    """Write a compressed file's content to `target` if that does not exist. Of several processes, one writes it.

    Raises:
        UserError: the file is truncated or damaged.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(target.with_name(target.name + ".lock")):
        if target.exists():
            return
        with open_input(path) as file, damage_as_user_error(path, compression), atomic_file(target) as copy:
            content = decompressed(file, compression)
            while block := content.read(BLOCK):
                copy.write(block)
