"""Read files at any fsspec URL, and cache those that are read often.

A local path is a Path everywhere, file://… too; a remote location is a URL, a str. Nothing here writes to a remote
store: remote_path.py does, for checkpoints.

    $TRINITY_CACHE (~/.cache/trinity)
        shards/<hash of the URL>/     files under their own names, each whole or absent; *.lock during a download
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
from trinity.io.local import atomic_file, file_lock, make_folder

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from typing_extensions import Buffer

BLOCK = 1 << 22


def local_or_url(path: Path | str) -> Path | str:
    """Convert a location: a Path for a local one, a str for the URL of a remote one."""
    text = str(path)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return text if "://" in text else Path(text)


def filesystem(url: str) -> tuple["AbstractFileSystem", str]:
    """Return (the fsspec file system of a URL, the path in it).

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
def remote_errors(url: str) -> Iterator[None]:
    """Context manager: turn any error of a remote file system into one sentence that names the URL.

    Raises:
        UserError: the file does not exist.
        Failure: any other error: no network, no permission, an error of the server.
    """
    try:
        yield
    except (UserError, Failure):
        raise
    except FileNotFoundError:
        raise UserError(f"{url} does not exist; check the address") from None
    except Exception as error:  # each protocol's package has its own exceptions
        raise remote_failure(url, "read", error) from error


def remote_failure(url: str, verb: str, error: Exception) -> Failure:
    """A Failure that says in one sentence that a URL cannot be read, written or deleted, and why."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return Failure(f"{url} cannot be {verb} ({reason}); run the same command again to continue")


@contextmanager
def open_input(path: Path | str) -> Iterator[io.BufferedReader]:
    """Open a local or remote file for reading."""
    if isinstance(path, Path):
        with open(path, "rb") as file:
            yield file
        return
    files, name = filesystem(path)
    with _open(path, files, name) as raw:
        # fsspec's own files read lines slowly
        yield io.BufferedReader(_RemoteFile(raw, path), BLOCK)


def file_size(path: Path | str) -> int:
    """Size in bytes of a local or remote file."""
    if isinstance(path, Path):
        return path.stat().st_size
    files, name = filesystem(path)
    with remote_errors(path):
        return files.size(name)


def remote_fingerprint(url: str) -> str:
    """Hash of a remote file's metadata (size, time, ETag), which changes when the file changes."""
    files, name = filesystem(url)
    with remote_errors(url):
        return f"{int(files.checksum(name)) % 2**128:032x}"


def cache_folder() -> Path:
    """$TRINITY_CACHE, or ~/.cache/trinity."""
    return Path(os.environ.get("TRINITY_CACHE") or Path.home() / ".cache" / "trinity")


def cache_folder_of(url: str) -> Path:
    """The local cache folder for a remote folder; created if missing."""
    folder = cache_folder() / "shards" / hashlib.blake2b(url.rstrip("/").encode(), digest_size=16).hexdigest()
    make_folder(folder)
    return folder


def fetch(url: str, path: Path, size: int | None = None, digest: str | None = None) -> None:
    """Download a remote file to `path`, unless it exists. One process downloads; others that need it wait.

    Args:
        url: the remote file.
        path: the local file; its folder exists.
        size, digest: expected size in bytes and content_hash.
    Raises:
        UserError: the file does not exist, or its size or hash differs.
        Failure: the remote store cannot be reached.
    """
    if path.exists():
        return
    with file_lock(path.with_name(path.name + ".lock")):
        if path.exists():
            return
        with open_input(url) as source, atomic_file(path) as copy:
            content = new_hash()
            while block := source.read(BLOCK):
                copy.write(block)
                content.update(block)
            wrong = f"{copy.tell()} bytes of {size}" if size not in (None, copy.tell()) else None
            if wrong is None and digest not in (None, content.hexdigest()):
                wrong = "its checksum is another"
            if wrong:
                raise UserError(
                    f"{url} is not what {path.parent / 'index.json'} names ({wrong}); fix it there, "
                    f"or remove {path.parent} if the folder was made again"
                )


def _open(url: str, files: "AbstractFileSystem", name: str) -> BinaryIO:
    with remote_errors(url):
        return files.open(name, "rb")


class _RemoteFile(io.RawIOBase):
    """A file of fsspec whose errors become a UserError or Failure of one sentence."""

    def __init__(self, file: BinaryIO, url: str) -> None:
        self._file, self._url = file, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        with remote_errors(self._url):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: "Buffer") -> int:
        view = memoryview(buffer)
        with remote_errors(self._url):
            data = self._file.read(len(view))
        view[: len(data)] = data
        return len(data)
