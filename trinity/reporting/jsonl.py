"""Files of one JSON object a line, read while somebody may still be writing them, and columns of their numbers.

A last line that is cut off is one that is being written. Where steps go back (a rollback), what came after the step to
which they go back is dropped, so that each step counts once.
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
    """(offset of the line in bytes, its object) for each line; None for one that cannot be read.

    The last line is left out if it lacks its end, unless it can be read all the same.
    """
    with open(path, "rb") as file:
        offset = 0
        for line in file:
            found = _object(line)
            if line.strip() and (found is not None or line.endswith(b"\n")):
                yield offset, found
            offset += len(line)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class Columns:
    """Numbers by step: N steps in rising order, a column a field; NaN where a step lacks the field.

    Attributes:
        steps: [N] ascending.
        not_finite: of each field, how many values were NaN or infinite.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.not_finite: Counter[str] = Counter()
        self._columns: dict[str, array] = {}

    def add(self, step: int, record: dict[str, Any]) -> int:
        """Take the numbers of one record; null is one that is not finite, and what is no number is passed over.

        Returns:
            how many steps are kept from before: those below `step`.
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
        """Whether some step has a finite value of this field."""
        return name in self._columns and bool(np.isfinite(self[name]).any())

    def __getitem__(self, name: str) -> np.ndarray:
        """[N] float64, NaN where there is no finite value."""
        values = np.full(len(self.steps), NAN)
        column = self._columns.get(name, array("d"))
        values[: len(column)] = column
        return values

    def names(self, prefix: str) -> list[str]:
        """The fields that begin so and have values, in the order of their first appearance."""
        return [name for name in self._columns if name.startswith(prefix) and name in self]


def whole_step(record: dict[str, Any] | None) -> int | None:
    """The record's step, None where it names none that can be."""
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
