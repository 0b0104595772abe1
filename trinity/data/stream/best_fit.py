"""Best-fit decreasing: put whole examples into as few rows as possible (Johnson et al. 1974).

The examples are taken from the longest to the shortest; each goes to the row with the least room that holds it, or to a
new row. Never more than 11/9 of the fewest possible rows, and one; of examples much shorter than a row, all rows but
the last are nearly full.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

from trinity.errors import UserError


def pack_best_fit(lengths: Sequence[int], capacity: int, first: int = 0) -> list[list[int]]:
    """The examples of each row, as indices of `lengths`, the longest first.

    Args:
        lengths: tokens of each example, at most `capacity` and at least 1; of equal ones the first is placed first.
        capacity: tokens of a row.
        first: the examples 0 … first − 1, which fit into one row, are in the first row together.
    """
    rows: list[list[int]] = [list(range(first))] if first else []
    # (tokens left, row) of each row, ascending
    rooms: list[tuple[int, int]] = [(capacity - sum(lengths[:first]), 0)] if first else []
    for index in sorted(range(first, len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        assert 0 < length <= capacity
        at = bisect_left(rooms, (length, 0))
        if at < len(rooms):
            room, row = rooms.pop(at)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(rooms, (room - length, row))
    return rows


def check_fits(source: str, document: int, length: int, capacity: int) -> None:
    """Refuse an example that is longer than a row.

    Args:
        source: name of its source in data.train or data.validation.
        document, length: its number, and its tokens.
        capacity: tokens of a row.
    Raises:
        UserError: it is longer.
    """
    if length > capacity:
        raise UserError(
            f"document {document} of {source} has {length} tokens, and data.packing=best_fit splits none into rows of "
            f"data.sequence_length={capacity}; use data.sequence_length={length} or more, or split its text (of chat "
            f"data, prepare it with --max-tokens {capacity} --too-long drop)"
        )
