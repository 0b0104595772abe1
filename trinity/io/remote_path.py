"""RemotePath: a pathlib-like path for any fsspec URL, so that most code treats local and remote files alike.

An object store has no rename and no fsync, and needs neither: a small file is one put, which is visible as a whole or
not at all, and is durable once the put returns. fsspec's cached listings are dropped before every access, because other
processes write to the same store. A store that does not answer raises Failure. fsspec's own exists, glob and find would
report the file as missing.
"""

import errno
import io
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from trinity.errors import Failure, UserError
from trinity.io.checksum import FileSum, RunningSum
from trinity.io.remote import filesystem, local_or_url, open_input, remote_failure

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PART = 1 << 24
"""Bytes of one part of an upload. S3 allows 10,000 parts per file: 160 GiB from one rank."""


@dataclass(frozen=True)
class RemotePath:
    """A file or folder at a URL."""

    url: str

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        """The folder that contains it."""
        return RemotePath(self.url.rpartition("/")[0])

    def exists(self) -> bool:
        """Whether the file or folder exists; in an object store a folder exists if it contains anything."""
        try:
            with _open_remote(self.url) as (files, name):
                files.info(name)
        except FileNotFoundError:
            return False
        return True

    def sizes(self) -> dict[str, int]:
        """Size in bytes of every entry of this folder, by name, from one listing; empty if there is no folder."""
        try:
            with _open_remote(self.url) as (files, name):
                entries = files.ls(name, detail=True)
        except FileNotFoundError:
            return {}
        return {entry["name"].rstrip("/").rpartition("/")[2]: entry["size"] or 0 for entry in entries}

    def glob(self, pattern: str) -> list["RemotePath"]:
        """Entries of this folder whose names match the pattern."""
        return [self / name for name in self.sizes() if fnmatch(name, pattern)]

    def open(self, mode: str = "rb", buffering: int = -1) -> AbstractContextManager[io.BufferedReader]:
        """Open the file for reading."""
        assert mode == "rb"
        filesystem(self.url)[0].invalidate_cache()
        return open_input(self.url)

    def read_bytes(self) -> bytes:
        """Read the whole file."""
        with _open_remote(self.url) as (files, name):
            return files.cat_file(name)

    def write_bytes(self, content: bytes) -> None:
        """Write a small file in one put."""
        with _open_remote(self.url, "written") as (files, name):
            files.pipe_file(name, content)

    @contextmanager
    def create(self) -> Iterator["RemoteWriter"]:
        """Context manager: write a large file in parts. An interrupted upload may leave a partial file."""
        with _open_remote(self.url, "written") as (files, name):
            file = files.open(name, "wb", block_size=PART)
        stream = RemoteWriter(file, self.url)
        try:
            yield stream
            stream.close()
        except BaseException:
            with suppress(Exception):
                file.close()
            if stream.failure is not None:  # torch.save hides it behind an error of its own
                raise stream.failure from None
            raise

    def mkdir(self, parents: bool = True) -> None:
        """Create the folder, if the file system has folders and it does not exist."""
        with _open_remote(self.url, "written") as (files, name):
            files.makedirs(name, exist_ok=True)

    def unlink(self, missing_ok: bool = True) -> None:
        """Delete the file, if it exists."""
        assert missing_ok
        with suppress(FileNotFoundError), _open_remote(self.url, "deleted") as (files, name):
            files.rm_file(name)

    def rmtree(self) -> None:
        """Delete the folder with its content, if it exists; an object store has no empty folders."""
        with suppress(FileNotFoundError), _open_remote(self.url, "deleted") as (files, name):
            files.rm(name, recursive=True)


AnyPath = Path | RemotePath


def any_path(url: str) -> AnyPath:
    """Convert a path or URL: a Path for a local one, a RemotePath for a remote one.

    Raises:
        UserError: an unknown protocol, or one whose package is not installed.
    """
    location = local_or_url(url)
    if isinstance(location, Path):
        return location
    filesystem(location)
    return RemotePath(location.rstrip("/"))


@contextmanager
def _open_remote(url: str, verb: str = "read") -> Iterator[tuple["AbstractFileSystem", str]]:
    """Context manager: (fsspec file system, path in it). FileNotFoundError passes; any other error becomes Failure."""
    files, name = filesystem(url)
    try:
        files.invalidate_cache()
        yield files, name
    except (UserError, Failure):
        raise
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from None
    except Exception as error:  # each protocol's package has its own exceptions
        raise remote_failure(url, verb, error) from error


class RemoteWriter(io.RawIOBase):
    """A remote file open for writing, whose checksum is computed on the way; errors of the store become Failure."""

    def __init__(self, file: BinaryIO, url: str) -> None:
        self._file, self._url = file, url
        self._sum = RunningSum()
        self.failure: Failure | None = None

    @property
    def sum(self) -> FileSum:
        """Size and crc32 of the data written so far."""
        return self._sum.value()

    def writable(self) -> bool:
        """True; it is neither readable nor seekable."""
        return True

    def tell(self) -> int:
        """Bytes written so far."""
        return self._sum.bytes

    def write(self, data: Any) -> int:
        """Write all of the data."""
        with self._record_failure():
            self._file.write(data)
        self._sum.update(data)
        return memoryview(data).nbytes

    def close(self) -> None:
        """Upload the last part; the file exists only then."""
        if not self.closed:
            super().close()
            with self._record_failure():
                self._file.close()

    @contextmanager
    def _record_failure(self) -> Iterator[None]:
        """Context manager: raise any error as Failure, and keep it in `failure`."""
        try:
            yield
        except Exception as error:
            self.failure = remote_failure(self._url, "written", error)
            raise self.failure from error
