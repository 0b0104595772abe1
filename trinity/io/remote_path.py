"""Files at any fsspec URL, under pathlib's names for what is done with them, so that most code need not ask which.

An object store has no rename and needs none: a small file is one put, which shows whole or not at all. Nor has it
fsync: what it has taken it keeps. Listings that fsspec remembers are dropped before each look, as other processes write
there too. A store that does not answer is a Failure, never taken for a file that is missing: fsspec's own exists, glob
and find do that.
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
from trinity.io.remote import filesystem, located, open_input, refused

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PART = 1 << 24
"""Bytes that go out at once. S3 takes 10,000 parts a file: 160 GiB from one rank."""


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
        """The folder it is in."""
        return RemotePath(self.url.rpartition("/")[0])

    def exists(self) -> bool:
        """Whether it is there; a folder of an object store is where something in it is."""
        try:
            with _asked(self.url) as (files, name):
                files.info(name)
        except FileNotFoundError:
            return False
        return True

    def sizes(self) -> dict[str, int]:
        """Bytes of everything in this folder, by name, from one listing; none where there is no folder."""
        try:
            with _asked(self.url) as (files, name):
                found = files.ls(name, detail=True)
        except FileNotFoundError:
            return {}
        return {entry["name"].rstrip("/").rpartition("/")[2]: entry["size"] or 0 for entry in found}

    def glob(self, pattern: str) -> list["RemotePath"]:
        """What is in this folder under a name like that."""
        return [self / name for name in self.sizes() if fnmatch(name, pattern)]

    def open(self, mode: str = "rb", buffering: int = -1) -> AbstractContextManager[io.BufferedReader]:
        """To read."""
        assert mode == "rb"
        filesystem(self.url)[0].invalidate_cache()
        return open_input(self.url)

    def read_bytes(self) -> bytes:
        """All of a file."""
        with _asked(self.url) as (files, name):
            return files.cat_file(name)

    def write_bytes(self, content: bytes) -> None:
        """A small file, in one put."""
        with _asked(self.url, "written") as (files, name):
            files.pipe_file(name, content)

    @contextmanager
    def create(self) -> Iterator["RemoteWriter"]:
        """A large file, in parts. One that breaks off may leave a part of itself."""
        with _asked(self.url, "written") as (files, name):
            file = files.open(name, "wb", block_size=PART)
        stream = RemoteWriter(file, self.url)
        try:
            yield stream
            stream.close()
        except BaseException:
            with suppress(Exception):
                file.close()
            if stream.failure is not None:  # torch.save tells of an error of its own that follows from it
                raise stream.failure from None
            raise

    def mkdir(self, parents: bool = True) -> None:
        """Make the folder where the file system has such; it may be there."""
        with _asked(self.url, "written") as (files, name):
            files.makedirs(name, exist_ok=True)

    def unlink(self, missing_ok: bool = True) -> None:
        """Delete a file, which may be gone already."""
        assert missing_ok
        with suppress(FileNotFoundError), _asked(self.url, "deleted") as (files, name):
            files.rm_file(name)

    def rmtree(self) -> None:
        """Delete a folder, which an object store no longer has once it is empty."""
        with suppress(FileNotFoundError), _asked(self.url, "deleted") as (files, name):
            files.rm(name, recursive=True)


AnyPath = Path | RemotePath


def any_path(url: str) -> AnyPath:
    """Where a path or URL leads: a local one is a Path.

    Raises:
        UserError: an unknown protocol, or one whose package is not installed.
    """
    found = located(url)
    if isinstance(found, Path):
        return found
    filesystem(found)
    return RemotePath(found.rstrip("/"))


@contextmanager
def _asked(url: str, verb: str = "read") -> Iterator[tuple["AbstractFileSystem", str]]:
    """(the file system, the path in it); what it says of a file that is missing stays, all else becomes a sentence."""
    files, name = filesystem(url)
    try:
        files.invalidate_cache()
        yield files, name
    except (UserError, Failure):
        raise
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from None
    except Exception as error:  # each protocol's package has its own
        raise refused(url, verb, error) from error


class RemoteWriter(io.RawIOBase):
    """What is written to a file elsewhere, summed as it goes out; the store's errors are sentences."""

    def __init__(self, file: BinaryIO, url: str) -> None:
        self._file, self._url = file, url
        self._sum = RunningSum()
        self.failure: Failure | None = None

    @property
    def sum(self) -> FileSum:
        """Of what has gone out so far."""
        return self._sum.value()

    def writable(self) -> bool:
        """Yes, and nothing else."""
        return True

    def tell(self) -> int:
        """Bytes so far."""
        return self._sum.bytes

    def write(self, data: Any) -> int:
        """All of the data."""
        with self._told():
            self._file.write(data)
        self._sum.update(data)
        return memoryview(data).nbytes

    def close(self) -> None:
        """Hand over the last part; only then is there a file."""
        if not self.closed:
            super().close()
            with self._told():
                self._file.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.failure = refused(self._url, "written", error)
            raise self.failure from error
