"""Files that may lie elsewhere: any fsspec URL can be read, and is kept in a local cache where it is read often.

A local file is a Path everywhere, and so is file://…; what lies elsewhere stays a URL, a str. Nothing is written there
by this file; trinity/io/remote_path.py writes checkpoints.

    $TRINITY_CACHE (~/.cache/trinity)
        shards/<hash of the URL>/     files as they are named there, each whole or absent; *.lock while one is fetched
"""

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from trinity.errors import Failure, UserError
from trinity.io.checksum import new_hash
from trinity.io.local import atomic_file, locked, make_folder

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

BLOCK = 1 << 22


def located(path: Path | str) -> Path | str:
    """A local path as Path, the URL of something that lies elsewhere as str."""
    text = str(path)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return text if "://" in text else Path(text)


def filesystem(url: str) -> tuple["AbstractFileSystem", str]:
    """(the file system of a URL, the path in it).

    Raises:
        UserError: an unknown protocol, or one whose package is not installed.
    """
    from fsspec import available_protocols
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url} needs a package that is not installed here; what fsspec says of it: {error}") from None
    except ValueError as error:
        known = ", ".join(name for name in ("file", "s3", "gs", "http", "https", "hf") if name in available_protocols())
        raise UserError(f"{url} cannot be opened ({error}); use a path or a protocol such as {known}") from None


@contextmanager
def reached(url: str) -> Iterator[None]:
    """Says of whatever a file system elsewhere raises that this URL could not be read.

    Raises:
        UserError: there is no such file.
        Failure: anything else: no network, no permission, a server's error.
    """
    try:
        yield
    except (UserError, Failure):
        raise
    except FileNotFoundError:
        raise UserError(f"{url} does not exist; check the address") from None
    except Exception as error:  # each protocol's package has its own
        raise refused(url, "read", error) from error


def refused(url: str, verb: str, error: Exception) -> Failure:
    """One sentence for whatever a file system elsewhere raises: this URL cannot be read, written, …"""
    reason = " ".join(str(error).split()) or type(error).__name__
    return Failure(f"{url} cannot be {verb} ({reason}); run the same command again to go on")


@contextmanager
def open_input(path: Path | str) -> Iterator[io.BufferedReader]:
    """A file open for reading, wherever it lies."""
    if isinstance(path, Path):
        with open(path, "rb") as file:
            yield file
        return
    files, name = filesystem(path)
    with _raw(path, files, name) as raw:
        # fsspec's own files are slow at lines.
        yield io.BufferedReader(_Reached(raw, path), BLOCK)


def size_of(path: Path | str) -> int:
    """Bytes of a file, wherever it lies."""
    if isinstance(path, Path):
        return path.stat().st_size
    files, name = filesystem(path)
    with reached(path):
        return files.size(name)


def mark_of(url: str) -> str:
    """What changes when a file elsewhere does: a hash of what its file system tells of it (size, time, ETag)."""
    files, name = filesystem(url)
    with reached(url):
        return f"{int(files.checksum(name)) % 2**128:032x}"


def cache_folder() -> Path:
    """$TRINITY_CACHE, or ~/.cache/trinity."""
    return Path(os.environ.get("TRINITY_CACHE") or Path.home() / ".cache" / "trinity")


def cached_folder(url: str) -> Path:
    """The local folder for what is fetched from a folder elsewhere; made if it is not there."""
    folder = cache_folder() / "shards" / hashlib.blake2b(url.rstrip("/").encode(), digest_size=16).hexdigest()
    make_folder(folder)
    return folder


def fetch(url: str, path: Path, size: int | None = None, digest: str | None = None) -> None:
    """Copy a file from elsewhere to `path`, unless it is there. Of several processes one copies, the others wait.

    Args:
        url: the file.
        path: where to; the folder exists.
        size, digest: bytes and checksum (see content_hash) that it must have.
    Raises:
        UserError: there is no such file, or it is another than size and digest say.
        Failure: it cannot be reached.
    """
    if path.exists():
        return
    with locked(path.with_name(path.name + ".lock")):
        if path.exists():
            return
        with open_input(url) as source, atomic_file(path) as copy:
            found = new_hash()
            while block := source.read(BLOCK):
                copy.write(block)
                found.update(block)
            wrong = f"{copy.tell()} bytes of {size}" if size not in (None, copy.tell()) else None
            if wrong is None and digest not in (None, found.hexdigest()):
                wrong = "its checksum is another"
            if wrong:
                raise UserError(
                    f"{url} is not what {path.parent / 'index.json'} names ({wrong}); mend it there, "
                    f"or remove {path.parent} if the folder was made anew"
                )


def _raw(url: str, files: "AbstractFileSystem", name: str) -> BinaryIO:
    with reached(url):
        return files.open(name, "rb")


class _Reached(io.RawIOBase):
    """A file of fsspec's whose errors are sentences."""

    def __init__(self, file: BinaryIO, url: str) -> None:
        self._file, self._url = file, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        with reached(self._url):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: memoryview) -> int:
        with reached(self._url):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
