"""Atomic writes and file locks on a local disk. No other module renames files.

A write goes to a temporary file beside the target (`NAME.tmp`), which is fsynced and renamed; then the folder is
fsynced. A reader sees the old file or the whole new one, also after a power cut. A new file has the mode that the umask
gives. A file whose name ends in .tmp is left from an interrupted write, and is never read.
"""

import errno
import fcntl
import math
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from trinity.errors import UserError

SUFFIX = ".tmp"
UNSUPPORTED = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""errno of a network file system that supports no locks, or no fsync of folders."""
_LINK_LOOP = "{} is or contains a symbolic link that leads to itself; remove the link, or give another path"


def temporary_path(path: Path) -> Path:
    """The temporary file of a target, NAME.tmp."""
    return path.with_name(path.name + SUFFIX)


def resolve_path(path: str | Path) -> Path:
    """The absolute path without symbolic links; it need not exist.

    Raises:
        UserError: a link leads to itself, directly or through others.
    """
    try:
        resolved = Path(path).resolve()
    except (RuntimeError, OSError) as error:  # before Python 3.13 a RuntimeError says that links form a loop
        if isinstance(error, OSError) and error.errno != errno.ELOOP:
            raise
        raise UserError(_LINK_LOOP.format(path)) from None
    if any(part.is_symlink() for part in (resolved, *resolved.parents)):  # only in a loop does resolve leave a link
        raise UserError(_LINK_LOOP.format(path))
    return resolved


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Context manager: a temporary file, open for writing, that is renamed to `path` when the block ends.

    If the block raises, the temporary file is removed and an older file at `path` stays unchanged.

    Raises:
        OSError: its filename is `path`, not the temporary file.
    """
    with _errors_name(path), open(temporary_path(path), "wb") as file:
        yield file
        sync(file)
    with _errors_name(path):
        publish(path)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Context manager: the name of a temporary file, for a library that takes file names; renamed to `path` at the end.

    The file gets the mode that the umask gives, not the mode that the library set (safetensors: 600).
    """
    with _errors_name(path):
        with open(temporary_path(path), "wb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield temporary_path(path)
        os.chmod(temporary_path(path), mode)
        with open(temporary_path(path), "rb") as file:
            os.fsync(file.fileno())
        publish(path)


def write_atomically(path: Path, content: str | bytes | Iterable[str]) -> int:
    """Write a whole file; if that fails, the old file stays unchanged.

    Args:
        path: the file; its folder exists.
        content: bytes, or text as one string or several, written as UTF-8. Bytes that were read with
            errors="surrogateescape" are written back unchanged.
    Returns:
        Bytes written.
    """
    chunks = [content] if isinstance(content, str | bytes) else content
    with atomic_file(path) as file:
        for chunk in chunks:
            file.write(chunk if isinstance(chunk, bytes) else chunk.encode("utf-8", "surrogateescape"))
        return file.tell()


def copy_atomically(source: Path, target: Path) -> None:
    """Copy a file's content, not its mode; the copy has the mode that the umask gives."""
    with open(source, "rb") as content, atomic_file(target) as file:
        while block := content.read(1 << 20):
            file.write(block)


def sync(file: BinaryIO) -> None:
    """Flush an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def publish(path: Path) -> None:
    """Rename a whole, fsynced temporary file to `path`, and fsync the folder so that the name survives a power cut."""
    os.replace(temporary_path(path), path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Fsync a folder, so that the names in it survive a power cut; a no-op where the file system cannot."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, and fsync their names."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


@contextmanager
def file_lock(path: Path, patience: float | None = None) -> Iterator[None]:
    """Context manager: hold an exclusive lock. The operating system releases the lock of a process that died.

    Args:
        path: a folder, or a file, which is created if missing.
        patience: seconds to wait for another process; None: no limit.
    Raises:
        BlockingIOError: another process still holds the lock.
    """
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline = math.inf if patience is None else time.monotonic() + patience
        while not try_lock(handle, wait=patience is None):
            if time.monotonic() > deadline:
                raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(path))
            time.sleep(0.05)
        yield
    finally:
        os.close(handle)


def try_lock(handle: int, wait: bool = False) -> bool:
    """Lock an open file or folder until it is closed; return False if another process holds the lock.

    On a network file system without locks this returns True: there, users must not start two processes.
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
def _errors_name(path: Path) -> Iterator[None]:
    """If the block fails, remove the temporary file and set the error's filename to `path`."""
    try:
        yield
    except BaseException as error:
        with suppress(OSError):
            temporary_path(path).unlink()
        if isinstance(error, OSError) and error.filename in (None, str(temporary_path(path))):
            error.filename = str(path)
        raise
