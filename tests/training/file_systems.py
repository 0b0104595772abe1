"""Small and read-only file systems for a test; where mounting is not allowed, the test is skipped."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def mount(*words: object) -> None:
    """Call mount; skip the test where it is not permitted."""
    result = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"needs the right to mount: {result.stderr.strip()}")


def unmount(folder: Path) -> None:
    """Call umount."""
    subprocess.run(["umount", folder], check=True)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Context manager: a file system of this size, mounted on a new folder."""
    folder.mkdir(parents=True)
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    try:
        yield folder
    finally:
        unmount(folder)


def resize(folder: Path, size: str) -> None:
    """Change the size of a small disk."""
    mount("-o", f"remount,size={size}", folder)


def make_read_only(folder: Path) -> None:
    """Make a folder read-only: files that are already open can still be written."""
    mount("--bind", folder, folder)
    mount("-o", "remount,bind,ro", folder)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Context manager: a read-only folder."""
    make_read_only(folder)
    try:
        yield
    finally:
        unmount(folder)
