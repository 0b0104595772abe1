"""JSON files: null for NaN and infinity on writing; both are accepted on reading.

JSON has no NaN and no infinity. Python's json module writes them anyway, and no other parser accepts them: `to_json`
writes null instead. Older files with NaN can still be read.
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
    """JSON text, with null for each number that is not finite.

    Args:
        value: any value that json.dumps accepts.
        options: passed to json.dumps: indent, ensure_ascii.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def number(value: float | None) -> float:
    """Convert a number that to_json wrote: null to NaN."""
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
    """Write a whole JSON file; if that fails, the old file stays unchanged."""
    write_atomically(path, to_json(value, indent=indent, ensure_ascii=ensure_ascii) + "\n")


def read_json(path: Path, mend: str = REMAKE) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file.

    Args:
        path: the file.
        mend: what the user can do about a damaged file, for the message.
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
    """Append a JSON object as one line, in one write, so that lines of several processes do not mix.

    Raises:
        OSError: the line was not written, or in part only; the next append ends a partial line first.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        is_partial = size and os.pread(descriptor, 1, size - 1) != b"\n"
        line = ("\n" * bool(is_partial) + to_json(value) + "\n").encode()
        while line:  # a nearly full disk takes a part of the line; the next write then raises its error
            line = line[os.write(descriptor, line) :]
    finally:
        os.close(descriptor)
