"""Files that are whole or absent, and short names for what a file holds."""

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trinity.errors import UserError

SAMPLES = 64
SAMPLE_BYTES = 1 << 16
SUFFIX = ".tmp"


def temporary(path: Path) -> Path:
    """Where a file is written before it takes its name; whatever ends so is never read."""
    return path.with_name(path.name + SUFFIX)


def move_into_place(path: Path) -> None:
    """Give a whole, fsynced temporary file its name, and make the name last through a power cut."""
    os.replace(temporary(path), path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomically(path: Path, chunks: Iterable[str]) -> int:
    """Write UTF-8 text so that a reader sees the old file or the whole new one.

    Returns:
        Bytes written.
    """
    with open(temporary(path), "w", encoding="utf-8", newline="\n") as file:
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    move_into_place(path)
    return size


@contextmanager
def locked(path: Path, patience: float | None = None) -> Iterator[None]:
    """Until this ends no other process passes here. The system lifts the lock of a process that died.

    Args:
        path: a folder, or a file that is made if it is not there.
        patience: seconds to wait for another process; None waits as long as it takes.
    Raises:
        BlockingIOError: another process still holds the lock.
    """
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline = None if patience is None else time.monotonic() + patience
        while not _try_lock(handle, wait=deadline is None):
            if time.monotonic() > deadline:
                raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(path))
            time.sleep(0.05)
        yield
    finally:
        os.close(handle)


def _try_lock(handle: int, wait: bool) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        # Some network file systems lock no folders, or nothing: there it is up to the user.
        if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
    return True


def read_json(path: Path) -> dict | None:
    """The JSON object in a file that this package wrote; None if there is no such file.

    Raises:
        UserError: the file is not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); remove its folder and make it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; remove its folder and make it again")
    return value


def checksum(path: Path) -> str:
    """blake2b of a file's content, 32 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, new_hash).hexdigest()


def new_hash() -> "hashlib._Hash":
    """The hash used for all files.

    blake2b: in the standard library, near 1 GB/s, and 128 bits of it never meet by accident; crc32 is no faster
    there, and with 32 bits one in four billion damaged files would pass.
    """
    return hashlib.blake2b(digest_size=16)


def check_inputs(inputs: list[Path], option: str = "--input") -> None:
    """Raises UserError for an input that is missing or is no file."""
    for path in inputs:
        if path.is_dir():
            raise UserError(f"{option} {path} is a folder; name the files in it")
        if not path.exists():
            raise UserError(f"{option} {path} does not exist; check the path")


def identity(path: Path) -> dict[str, str | int]:
    """What a file is recognised by when a command is run again: name, size, and the hash of 64 blocks spread over it.

    Up to 4 MiB that is all of its content. Larger files are sampled, because hashing terabytes would take hours on
    every start; a change that keeps the size and misses every block goes unseen.
    """
    size = path.stat().st_size
    sample = new_hash()
    with open(path, "rb") as file:
        for index in range(SAMPLES):
            file.seek(index * size // SAMPLES)
            sample.update(file.read(SAMPLE_BYTES))
    return {"name": path.name, "bytes": size, "sample": sample.hexdigest()}
