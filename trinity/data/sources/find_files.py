"""Find the files in a folder or of a glob pattern, follow links, choose one kind, and report the files left out.

A folder and the pattern FOLDER/**/* find the same files. Each real folder is entered once, so that a link to a parent
folder causes no loop. Hidden files and folders are left out.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import dropwhile
from pathlib import Path
from typing import NamedTuple

from trinity.data.sources.file_formats import ALL, KINDS, file_kind
from trinity.errors import UserError
from trinity.terminal import say

MAGIC = set("*?[")
SHOWN = 3
"""File names in a message about several files."""

Paths = Sequence[Path | str]
"""Local files as Path, remote files as URL."""


class Listing(NamedTuple):
    """The contents of a folder, or the matches of a pattern, sorted.

    files: files, and links to missing files.
    hidden: files and folders whose name begins with a dot; the contents of these folders are not listed.
    special: pipes, sockets and devices.
    """

    files: Paths
    hidden: Paths
    special: Paths


def list_folder(folder: Path) -> Listing:
    """The contents of a folder and of all folders below it.

    Raises:
        OSError: a folder cannot be read.
    """
    contents = [path for _, paths in walk(folder) for path in paths]
    hidden = [path for path in contents if _is_hidden(path)]
    return _sorted([path for path in contents if not _is_hidden(path)], hidden)


def list_pattern(pattern: str) -> Listing:
    """The matches of a pattern; ** matches any folders, and * matches no hidden name.

    Raises:
        OSError: a folder that the pattern enters cannot be read.
    """
    parts = pattern.strip("/").split("/")
    return _sorted(set(_matches(Path("/" if pattern.startswith("/") else ""), parts)), [])


def walk(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield a folder and all folders below it that are not hidden, following links, each with its contents.

    Raises:
        OSError: a folder cannot be read.
    """
    waiting, entered = [folder], set()
    while waiting:
        here = waiting.pop()
        status = here.stat()
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        contents = _contents(here)
        yield here, contents
        waiting += [path for path in reversed(contents) if path.is_dir() and not _is_hidden(path)]


def _matches(folder: Path, parts: list[str]) -> Iterator[Path]:
    """The matches of a pattern in a folder.

    The standard library's glob will not do: its ** follows loops of links, and it skips folders that it may not read.
    """
    part, *rest = parts
    if part == "**":
        after = [*dropwhile(lambda each: each == "**", rest)] or ["*"]
        for below, _ in walk(folder):
            yield from _matches(below, after)
        return
    if MAGIC & set(part):
        paths = [path for path in _contents(folder) if fnmatchcase(path.name, part)]
        paths = [path for path in paths if part.startswith(".") or not _is_hidden(path)]
    else:
        paths = [folder / part]
    for path in paths:
        if not rest:
            yield path
        elif path.is_dir():
            yield from _matches(path, rest)


def _contents(folder: Path) -> list[Path]:
    return [folder / name for name in sorted(os.listdir(folder))]


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") and path.name != ".."


def _sorted(paths: Iterable[Path], hidden: list[Path]) -> Listing:
    present = [path for path in sorted(paths) if os.path.lexists(path) and not path.is_dir()]
    files = {path for path in present if path.is_file() or not path.exists()}
    special = [path for path in present if path not in files]
    return Listing([path for path in present if path in files], sorted(hidden), special)


def choose(paths: Paths, kind: str | None, where: str) -> tuple[Paths, dict[str, Paths]]:
    """The files of one kind in their order, and the other files by kind.

    By default, Parquet files or lines are preferred to text: text beside them (README.md, a table in .csv) describes
    them.

    Args:
        paths: of a folder or pattern.
        kind: text, jsonl, parquet, or all; None: the only kind of data.
        where: the folder or pattern, for messages.
    Raises:
        UserError: there are both Parquet files and lines, and `kind` is None.
    """
    kinds = [known.name if (known := file_kind(path)) else "of a kind that is not read" for path in paths]
    if kind is None and {"parquet", "jsonl"} <= set(kinds):
        flag = "" if where.startswith("data.") else ", or --kind parquet, jsonl or all"
        raise UserError(f"{where} holds Parquet files and JSON lines; give a pattern for one, as '*.parquet'{flag}")
    chosen = KINDS if kind == ALL else [kind or next((name for name in KINDS if name in kinds), None)]
    left: dict[str, Paths] = {name: [] for name in sorted({*kinds} - {*chosen})}
    for name in left:
        left[name] = [path for path, path_kind in zip(paths, kinds) if path_kind == name]
    return [path for path, path_kind in zip(paths, kinds) if path_kind in chosen], left


def counted(groups: dict[str, Paths], folder: str = "") -> str:
    """Count and name files by group: 2 text (README.md, x.csv), 1 hidden (.git)."""
    parts = [f"{len(paths):,} {what} ({names(paths, folder)})" for what, paths in groups.items() if paths]
    return ", ".join(parts)


def names(paths: Iterable[Path | str], folder: str = "") -> str:
    """The first names of several: a.txt, b.txt, c.txt, …"""
    short = [str(path).removeprefix(folder).removeprefix("/") if folder else str(path) for path in paths]
    return ", ".join([*short[:SHOWN], *["…"][: len(short) > SHOWN]])


def note(sentence: str) -> None:
    """Print a note on stderr; of a run's processes, rank 0 prints it."""
    if os.environ.get("RANK", "0") == "0":
        say(f"note: {sentence}")
