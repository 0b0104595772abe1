"""Files that a command line names."""

from pathlib import Path

from trinity.errors import UserError


def check_inputs(inputs: list[Path], option: str = "--input") -> None:
    """Raises UserError for an input that is missing or is no file."""
    for path in inputs:
        if path.is_dir():
            raise UserError(f"{option} {path} is a folder; name the files in it")
        if not path.exists():
            raise UserError(f"{option} {path} does not exist; check the path")
