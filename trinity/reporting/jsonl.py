"""Read JSON Lines files that may still be written, and keep their numbers as columns by step.

An incomplete last line is still being written and is left out. If steps go back (a rollback), the records from that
step on are dropped, so that each step counts once.
"""

import bisect
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

NAN = float("nan")


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(byte offset, object) of each line; the object is None for a line that is no JSON object.

    A last line without its line break is left out, unless it is a complete object.
    """
    with open(path, "rb") as file:
        offset = 0
        for line in file:
            record = _parse_object(line)
            if line.strip() and (record is not None or line.endswith(b"\n")):
                yield offset, record
            offset += len(line)


def _parse_object(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


class Columns:
    """Numbers by step: one column for each field over N ascending steps; NaN where a step lacks the field.

    Attributes:
        steps: [N] ascending.
        not_finite: number of NaN or infinite values of each field.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.not_finite: Counter[str] = Counter()
        self._columns: dict[str, array] = {}

    def add(self, step: int, record: dict[str, Any]) -> int:
        """Add the numbers of one record; null counts as not finite, other values that are no numbers are ignored.

        Returns:
            the number of earlier steps that are kept: those below `step`.
        """
        kept = bisect.bisect_left(self.steps, step)
        if kept < len(self.steps):
            del self.steps[kept:]
            for column in self._columns.values():
                del column[kept:]
        self.steps.append(step)
        for name, value in record.items():
            if not isinstance(value, int | float | None):
                continue
            column = self._columns.setdefault(name, array("d"))
            column.extend([NAN] * (kept - len(column)))
            column.append(NAN if value is None else _finite(value))  # to_json writes null for NaN
            self.not_finite[name] += column[-1] != column[-1]
        return kept

    def __contains__(self, name: str) -> bool:
        """Whether any step has a finite value of this field."""
        return name in self._columns and bool(np.isfinite(self[name]).any())

    def __getitem__(self, name: str) -> np.ndarray:
        """[N] float64, NaN where there is no finite value."""
        values = np.full(len(self.steps), NAN)
        column = self._columns.get(name, array("d"))
        values[: len(column)] = column
        return values

    def names(self, prefix: str) -> list[str]:
        """The fields that begin with `prefix` and have values, in order of first appearance."""
        return [name for name in self._columns if name.startswith(prefix) and name in self]


def valid_step(record: dict[str, Any] | None) -> int | None:
    """The record's step; None if it has no valid one."""
    step = (record or {}).get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 1 << 53 else None


def _finite(value: float | None) -> float:
    if value is None:
        return NAN
    try:
        number = float(value)
    except OverflowError:  # an integer above 10³⁰⁸
        return NAN
    return number if abs(number) != float("inf") else NAN
