"""The files in a folder or of a pattern: links are followed, one kind is taken, and what is left out is named.

A folder and the pattern FOLDER/**/* find the same files. Each real folder is entered once, so that a link to a folder
above it ends. Hidden files and folders are left out.
"""

import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from itertools import dropwhile
from pathlib import Path
from typing import NamedTuple

from trinity.data.sources.file_kinds import ALL, KINDS, file_kind
from trinity.errors import UserError
from trinity.terminal import say

MAGIC = set("*?[")
SHOWN = 3
"""Names that a sentence about several files gives."""

Paths = list[Path] | list[str]


class Listing(NamedTuple):
    """What is in a folder or matches a pattern, sorted.

    files: files, and links to files that are not there.
    hidden: files and folders whose name begins with a dot; what is in such a folder is not listed.
    other: pipes, sockets and devices.
    """

    files: Paths
    hidden: Paths
    other: Paths


def list_folder(folder: Path) -> Listing:
    """All that is in a folder and below.

    Raises:
        OSError: a folder below it that cannot be read.
    """
    inside = [path for _, paths in walk(folder) for path in paths]
    hidden = [path for path in inside if _is_hidden(path)]
    return _sorted([path for path in inside if not _is_hidden(path)], hidden)


def list_pattern(pattern: str) -> Listing:
    """All that a pattern names; ** stands for any folders. A * stands for a hidden name in no place.

    Raises:
        OSError: a folder on the way that cannot be read.
    """
    parts = pattern.strip("/").split("/")
    return _sorted(set(_matches(Path("/" if pattern.startswith("/") else ""), parts)), [])


def walk(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """A folder and all below it that are not hidden, through links too, each with what is in it.

    Raises:
        OSError: a folder that cannot be read.
    """
    waiting, entered = [folder], set()
    while waiting:
        here = waiting.pop()
        status = here.stat()
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        inside = _inside(here)
        yield here, inside
        waiting += [path for path in reversed(inside) if path.is_dir() and not _is_hidden(path)]


def _matches(folder: Path, parts: list[str]) -> Iterator[Path]:
    """What a pattern names in a folder.

    The standard library's glob is no help: its ** goes round in loops of links, and it passes over folders that it may
    not read.
    """
    part, *rest = parts
    if part == "**":
        after = [*dropwhile(lambda each: each == "**", rest)] or ["*"]
        for below, _ in walk(folder):
            yield from _matches(below, after)
        return
    if MAGIC & set(part):
        found = [path for path in _inside(folder) if fnmatchcase(path.name, part)]
        found = [path for path in found if part.startswith(".") or not _is_hidden(path)]
    else:
        found = [folder / part]
    for path in found:
        if not rest:
            yield path
        elif path.is_dir():
            yield from _matches(path, rest)


def _inside(folder: Path) -> list[Path]:
    return [folder / name for name in sorted(os.listdir(folder))]


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") and path.name != ".."


def _sorted(paths: Iterable[Path], hidden: list[Path]) -> Listing:
    here = [path for path in sorted(paths) if os.path.lexists(path) and not path.is_dir()]
    files = {path for path in here if path.is_file() or not path.exists()}
    return Listing([path for path in here if path in files], sorted(hidden), [p for p in here if p not in files])


def choose(paths: Paths, kind: str | None, where: str) -> tuple[Paths, dict[str, Paths]]:
    """The files of one kind in their order, and the others by what they are.

    Where no kind is asked for, Parquet files or lines are taken before text: text beside them (README.md, a table in
    .csv) describes them.

    Args:
        paths: of a folder or pattern.
        kind: text, jsonl, parquet, or all; None: the one there is.
        where: the folder or pattern, as messages call it.
    Raises:
        UserError: there are both Parquet files and lines, and no kind is asked for.
    """
    kinds = [found.name if (found := file_kind(path)) else "of a kind that is not read" for path in paths]
    if kind is None and {"parquet", "jsonl"} <= set(kinds):
        flag = "" if where.startswith("data.") else ", or --kind parquet, jsonl or all"
        raise UserError(f"{where} holds Parquet files and JSON lines; give a pattern for one, as '*.parquet'{flag}")
    wanted = KINDS if kind == ALL else [kind or next((name for name in KINDS if name in kinds), None)]
    left = {name: [path for path, its in zip(paths, kinds) if its == name] for name in sorted({*kinds} - {*wanted})}
    return [path for path, its in zip(paths, kinds) if its in wanted], left


def counted(groups: dict[str, Paths], folder: str = "") -> str:
    """Files by what they are, counted and named: 2 text (README.md, x.csv), 1 hidden (.git)."""
    parts = [f"{len(paths):,} {what} ({names(paths, folder)})" for what, paths in groups.items() if paths]
    return ", ".join(parts)


def names(paths: Iterable[Path | str], folder: str = "") -> str:
    """The first names of several: a.txt, b.txt, c.txt, …"""
    short = [str(path).removeprefix(folder).removeprefix("/") if folder else str(path) for path in paths]
    return ", ".join([*short[:SHOWN], *["…"][: len(short) > SHOWN]])


def note(sentence: str) -> None:
    """Print a note on stderr, by one of a run's processes."""
    if os.environ.get("RANK", "0") == "0":
        say(f"note: {sentence}")
