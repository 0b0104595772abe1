"""What can be wrong with a call, found before anything is written: each mistake is a UserError.

Only the standard library is imported, as in results.py.
"""

import datetime
import json
import math
import os
from pathlib import Path

from gpu_check.parts import PARTS, Part
from gpu_check.results import FILES

from trinity.errors import UserError

SECONDS = 540
"""Default of CHECK_SECONDS: the total, from the start of gpu_check.sh."""


def total_seconds() -> float:
    """CHECK_SECONDS of the environment."""
    return _seconds("CHECK_SECONDS", SECONDS, 540)


def part_seconds() -> float:
    """CHECK_PART_SECONDS of the environment; infinite if it is not set."""
    return _seconds("CHECK_PART_SECONDS", math.inf, 60)


def _seconds(name: str, default: float, example: int) -> float:
    text = os.environ.get(name)
    if not text:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UserError(f"{name}={text} is not a number of seconds above 0; write for example {name}={example}")
    return seconds


def chosen(names: list[str]) -> list[Part]:
    """The parts of these names in the check's order; all without names.

    Raises:
        UserError: a part that does not exist, or one without a part that it needs.
    """
    known = [part.name for part in PARTS]
    for name in names:
        if name not in known:
            raise UserError(f"there is no part {name}; the parts are {', '.join(known)}")
    parts = [part for part in PARTS if not names or part.name in names]
    _refuse_alone(parts)
    return parts


def _refuse_alone(parts: list[Part]) -> None:
    there = {part.name for part in parts} | ({"data"} if os.environ.get("DATA") else set())
    for part in parts:
        lacking = [name for name in part.needs if name not in there]
        if not lacking:
            continue
        needs = ", and ".join(f"the part {name}" + (", or DATA=FOLDER" if name == "data" else "") for name in lacking)
        wanted = {part.name for part in parts} | set(lacking)
        together = " ".join(part.name for part in PARTS if part.name in wanted)
        raise UserError(f"{part.name} needs {needs}; write: {together}")


def refuse_out(folder: Path) -> None:
    """Refuse a folder in which the check would replace files, or which is no folder.

    Raises:
        UserError: it is a file, below a file, or has one of the check's files.
    """
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; name a folder for the results")
    found = [name for name in FILES if os.path.lexists(folder / name)]
    if not found:
        return
    if "check.json" in found or "results.jsonl" in found:
        raise UserError(f"{folder} holds a check of {_date(folder, found[0])}; name another folder, or delete it")
    raise UserError(f"{folder} has a file {found[0]}, which the check would replace; name another folder, or delete it")


def _date(folder: Path, name: str) -> str:
    """The date in check.json; if that has none, when the file `name` was last written."""
    try:
        return str(json.loads((folder / "check.json").read_text(encoding="utf-8"))["date"])
    except (OSError, ValueError, KeyError, TypeError):
        return datetime.date.fromtimestamp((folder / name).lstat().st_mtime).isoformat()
