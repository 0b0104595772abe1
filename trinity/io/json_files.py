"""JSON in files: strict on writing, patient on reading.

JSON has no NaN and no infinity, which Python's json writes all the same and which no other parser takes: `to_json`
writes null in their place. Files with NaN from before that are still read.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from trinity.errors import UserError
from trinity.io.local import write_atomically

REMAKE = "remove its folder and make it again"


def to_json(value: Any, **options: Any) -> str:
    """JSON text, null for each number that is not finite.

    Args:
        value: what json.dumps takes.
        options: of json.dumps: indent, ensure_ascii.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def number(value: float | None) -> float:
    """A number that to_json wrote: NaN for null."""
    return math.nan if value is None else value


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def write_json(path: Path, value: Any, indent: int | None = 1, ensure_ascii: bool = True) -> None:
    """Write a whole JSON file, or leave the old one as it is."""
    write_atomically(path, to_json(value, indent=indent, ensure_ascii=ensure_ascii) + "\n")


def read_json(path: Path, mend: str = REMAKE) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file.

    Args:
        path: the file.
        mend: what the user can do about a file that is damaged.
    Raises:
        UserError: the file is not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); {mend}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object but a {type(value).__name__}; {mend}")
    return value


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    """Append a JSON object as one line, in one write, so that several processes do not mix theirs.

    Raises:
        OSError: the file cannot be written, or not whole: the half line is ended by whoever appends next.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        cut_off = size and os.pread(descriptor, 1, size - 1) != b"\n"
        line = ("\n" * bool(cut_off) + to_json(value) + "\n").encode()
        while line:  # a disk with room for a part takes that, and says what is wrong when asked to take the rest
            line = line[os.write(descriptor, line) :]
    finally:
        os.close(descriptor)
