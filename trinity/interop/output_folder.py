"""The folder that an export or a merge makes: written under a temporary name, renamed when it is complete."""

import shutil
from pathlib import Path
from typing import Any

from trinity.errors import UserError
from trinity.io.json_files import read_json, write_json
from trinity.io.local import sync_folder

SHARD_BYTES = 5 * 10**9
"""Default size limit of one file."""
OVERWRITE_HINT = "say overwrite=True (--overwrite)"
"""What the refusal of an earlier export advises."""


def partial_folder(directory: Path) -> Path:
    """The temporary name of a folder, beside it."""
    return directory.parent / f".{directory.name}.partial"


def write_hf_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as transformers does: keys in insertion order, characters not escaped."""
    write_json(path, content, indent=2, ensure_ascii=False)


def check_replaceable(directory: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something else than an earlier export, or one that may not be replaced.

    Raises:
        UserError: the folder is not empty and not an export, or is one and `overwrite` is False.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not _is_export(directory):
        raise UserError(f"{directory} exists and is not an earlier export; give the name of a folder to make")
    if not overwrite:
        raise UserError(f"{directory} holds an earlier export or merge; give another folder, or {OVERWRITE_HINT}")


def _is_export(directory: Path) -> bool:
    """Whether the folder has an AfMoE config and only files: an export makes no subfolder."""
    try:
        raw = read_json(directory / "config.json")
    except (UserError, OSError):
        return False
    return (
        raw is not None and raw.get("model_type") == "afmoe" and all(entry.is_file() for entry in directory.iterdir())
    )


def replace_folder(partial: Path, directory: Path) -> None:
    """Rename `partial` to `directory`; first move an earlier export away: a rename cannot replace a full folder."""
    old = directory.parent / f".{directory.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    sync_folder(directory.parent)
    shutil.rmtree(old, ignore_errors=True)
