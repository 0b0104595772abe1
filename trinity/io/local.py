"""Atomic writes and file locks on a local disk: the only code here that gives a file its name.

A write goes to a temporary file beside the target (`NAME.tmp`), which is fsynced and renamed; then the folder is
fsynced. A reader sees the old file or the whole new one, also after a power cut. A new file has the mode that the umask
gives. Whatever ends in .tmp is the rest of a write that was cut off, and is never read.
"""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".tmp"
UNSUPPORTED = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""What a network file system answers that locks nothing, or syncs no folders."""


def temporary(path: Path) -> Path:
    """Where a file is written before it takes its name."""
    return path.with_name(path.name + SUFFIX)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing that takes the name `path` when the block ends.

    Where the block raises, the temporary file is removed and an older file at `path` stays as it was.

    Raises:
        OSError: naming `path`, not the temporary file.
    """
    with _named(path), open(temporary(path), "wb") as file:
        yield file
        sync(file)
    with _named(path):
        publish(path)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """The name of a temporary file, for a library that writes files by name; it becomes `path` when the block ends.

    The file gets the mode that the umask gives, whatever mode the library gave it (safetensors: 600).
    """
    with _named(path):
        with open(temporary(path), "wb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield temporary(path)
        os.chmod(temporary(path), mode)
        with open(temporary(path), "rb") as file:
            os.fsync(file.fileno())
        publish(path)


def write_atomically(path: Path, content: str | bytes | Iterable[str]) -> int:
    """Write a whole file, or leave the old one as it is.

    Args:
        path: the file; its folder exists.
        content: bytes, or text in one piece or several, which is written as UTF-8. A byte that was read with
            errors="surrogateescape" is written back as it was.
    Returns:
        Bytes written.
    """
    chunks = [content] if isinstance(content, str | bytes) else content
    with atomic_file(path) as file:
        for chunk in chunks:
            file.write(chunk if isinstance(chunk, bytes) else chunk.encode("utf-8", "surrogateescape"))
        return file.tell()


def copy_atomically(source: Path, target: Path) -> None:
    """Copy the content of a file; the copy has the mode that the umask gives."""
    with open(source, "rb") as content, atomic_file(target) as file:
        while block := content.read(1 << 20):
            file.write(block)


def sync(file: BinaryIO) -> None:
    """Flush an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def publish(path: Path) -> None:
    """Give a whole, fsynced temporary file its name, and make the name last through a power cut."""
    os.replace(temporary(path), path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a power cut, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, and make their names last through a power cut."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


@contextmanager
def locked(path: Path, patience: float | None = None) -> Iterator[None]:
    """Hold an exclusive lock. The system lifts the lock of a process that died.

    Args:
        path: a folder, or a file that is made if it is not there.
        patience: seconds to wait for another process; None waits as long as it takes.
    Raises:
        BlockingIOError: another process still holds the lock.
    """
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline = None if patience is None else time.monotonic() + patience
        while not try_lock(handle, wait=deadline is None):
            if time.monotonic() > deadline:
                raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(path))
            time.sleep(0.05)
        yield
    finally:
        os.close(handle)


def try_lock(handle: int, wait: bool = False) -> bool:
    """Lock an open file or folder until it is closed; False where another process holds the lock.

    On a network file system that locks nothing this answers True: there it is up to the user.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    return True


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Remove the temporary file where writing fails, and let the error name the file itself."""
    try:
        yield
    except BaseException as error:
        with suppress(OSError):
            temporary(path).unlink()
        if isinstance(error, OSError) and error.filename in (None, str(temporary(path))):
            error.filename = str(path)
        raise
