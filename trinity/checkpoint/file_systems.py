"""The two file systems that torch.distributed.checkpoint reads and writes through: local disk and remote store."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemBase

from trinity.io.checksum import FileSum
from trinity.io.remote_path import RemotePath


class LocalFileSystem(FileSystem):
    """The library's local file system, except that a failed write raises the system's error, such as a full disk.

    torch.save writes a zip file, continues after a failed write, and would raise its own RuntimeError instead.
    """

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        """Open a file, with mode "rb" or "wb"."""
        raw = _FirstErrorFile(path, mode)
        try:
            with io.BufferedWriter(raw) if mode == "wb" else io.BufferedReader(raw) as stream:
                yield stream
        except Exception:
            if raw.failure is not None:
                raise raw.failure from None
            raise


class _FirstErrorFile(io.FileIO):
    """A file that keeps its first write error in `failure`."""

    failure: OSError | None = None
    _write = io.FileIO.write

    def write(self, data: Any) -> int:
        try:
            return self._write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise


class RemoteFileSystem(FileSystemBase):
    """A remote store behind the library's interface of a file system. Every path is a RemotePath.

    The library declares paths as str or PathLike and only hands them back to this class. RemotePath is neither, so that
    no local open() accepts it: hence the ignored override errors.

    sums: size and crc32 of each file written through this object, by name.
    """

    def __init__(self) -> None:
        self.sums: dict[str, FileSum] = {}

    @contextmanager
    def create_stream(self, path: RemotePath, mode: str) -> Iterator[io.IOBase]:  # type: ignore[override]
        """Open a file, with mode "rb" or "wb"."""
        if mode == "rb":
            with path.open() as source:
                yield source
            return
        with path.create() as target:
            yield target
        self.sums[path.name] = target.sum

    def concat_path(self, path: RemotePath, suffix: str) -> RemotePath:  # type: ignore[override]
        """Join a folder and a name."""
        return path / suffix

    def rename(self, path: RemotePath, new_path: RemotePath) -> None:  # type: ignore[override]
        """Copy and delete, as object stores cannot rename.

        The library renames only .metadata, which counts for nothing until COMPLETE is written.
        """
        new_path.write_bytes(path.read_bytes())
        path.unlink()
        self.sums[new_path.name] = self.sums.pop(path.name)

    def init_path(self, path: RemotePath) -> RemotePath:  # type: ignore[override]
        """Return the path unchanged."""
        return path

    def mkdir(self, path: RemotePath) -> None:  # type: ignore[override]
        """Create a folder."""
        path.mkdir()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Unused: save.py and load.py construct the writer and the reader themselves."""
        return False

    def exists(self, path: RemotePath) -> bool:  # type: ignore[override]
        """Whether the file or folder exists."""
        return path.exists()

    def rm_file(self, path: RemotePath) -> None:  # type: ignore[override]
        """Delete a file."""
        path.unlink()
