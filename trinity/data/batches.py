"""Which sequences make which optimizer step: the global batch, and its growth during the run.

The report: Nano and Mini 4096 sequences, then 8192; Large 12288, and 16384 after 4.9T tokens.
"""

from bisect import bisect_right
from typing import NamedTuple

from trinity.errors import UserError


class _Segment(NamedTuple):
    """Steps of one size: from `step` on, whose first sequence is number `first`, each takes `sequences`."""

    step: int
    first: int
    sequences: int


class BatchPlan:
    """The global batch of every step, in whole numbers and without counting through the steps."""

    def __init__(self, sequences: int, ramp: list[tuple[int, int]], sequence_length: int) -> None:
        """Work out where each size begins.

        Args:
            sequences: global batch at the start of the run.
            ramp: (tokens, sequences), tokens rising: the first step that starts with at least that many tokens seen,
                and those after it, take so many sequences.
            sequence_length: tokens of one sequence.
        Raises:
            UserError: a batch or length below 1, or tokens that do not rise.
        """
        self.sequence_length = sequence_length
        last = 0
        for key, value in {"batch.sequences": sequences, "data.sequence_length": sequence_length}.items():
            if value < 1:
                raise UserError(f"{key}={value} must be at least 1")
        self._segments = [_Segment(0, 0, sequences)]
        for tokens, size in ramp:
            if size < 1 or tokens <= last:
                raise UserError(
                    f"batch.ramp has {size} sequences from {tokens} tokens on, after {last} tokens; "
                    "each entry must begin later than the one before it and have at least 1 sequence"
                )
            last = tokens
            step, first, present = self._segments[-1]
            steps = max(0, _divide_up(tokens - first * sequence_length, present * sequence_length))
            self._segments.append(_Segment(step + steps, first + steps * present, size))

    def at(self, step: int) -> tuple[int, int]:
        """(number of the first sequence, how many) of the global batch at a step, both counted from 0."""
        segment = self._segments[bisect_right(self._segments, step, key=lambda segment: segment.step) - 1]
        return segment.first + (step - segment.step) * segment.sequences, segment.sequences

    def steps_for_tokens(self, tokens: int) -> int:
        """The fewest steps that see at least so many tokens."""
        before = [segment for segment in self._segments if segment.first * self.sequence_length < tokens]
        if not before:
            return 0
        segment = before[-1]
        missing = tokens - segment.first * self.sequence_length
        return segment.step + _divide_up(missing, segment.sequences * self.sequence_length)


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)
