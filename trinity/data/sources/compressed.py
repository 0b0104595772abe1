"""Packed files, read as what was packed into them: gzip, zstd, bzip2 and xz."""

import bz2
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from trinity.errors import UserError
from trinity.io.local import atomic_file, locked
from trinity.io.remote import open_input

BLOCK = 1 << 18
# zstd --long=31 looks back over 2 GiB, and so must whoever unpacks it; the library allows 128 MiB unless it is told.
ZSTD = {zstd.DecompressionParameter.window_log_max: 31}


def unpacked(file: BinaryIO, packing: str | None) -> BinaryIO:
    """The content of an open file.

    Args:
        file: open for reading; it stays open when the content is closed.
        packing: gzip, zstd, bzip2 or xz; None: the file is not packed.
    """
    if packing == "gzip":
        return gzip.open(file)
    if packing == "zstd":
        return io.BufferedReader(zstd.ZstdFile(file, options=ZSTD), BLOCK)
    if packing == "bzip2":
        return bz2.open(file)
    if packing == "xz":
        return lzma.open(file)
    return file


@contextmanager
def whole(path: Path | str, packing: str | None) -> Iterator[None]:
    """Say of a packed file that is cut or damaged what is wrong with it.

    Raises:
        UserError: instead of what a library raises.
    """
    try:
        yield
    except (EOFError, zlib.error, zstd.ZstdError, lzma.LZMAError, pyarrow.ArrowException, OSError) as error:
        if packing is None or getattr(error, "errno", None):  # the disk's error, not the file's
            raise
        raise UserError(f"{path} is not a whole {packing} file ({error}); copy it again") from None


def unpack(path: Path, packing: str, target: Path) -> None:
    """Write a packed file's content to `target`, unless it is there. Of several processes one writes, the others wait.

    Raises:
        UserError: the file is cut or damaged.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(target.name + ".lock")):
        if target.exists():
            return
        with open_input(path) as file, whole(path, packing), atomic_file(target) as copy:
            content = unpacked(file, packing)
            while block := content.read(BLOCK):
                copy.write(block)
