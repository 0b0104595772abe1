"""Which sequences make which optimizer step: the global batch, how long its sequences are, and how both change.

The report: Nano and Mini 4096 sequences, then 8192; Large 12288, and 16384 after 4.9T tokens; longer sequences in
context extension. Whatever begins at a token count begins with the first step that starts with at least that many seen.
"""

from bisect import bisect_right
from typing import NamedTuple

from trinity.errors import UserError


class StepPlan(NamedTuple):
    """One step: number of its first sequence, how many, tokens of each, tokens seen before it, and its data phase."""

    first: int
    sequences: int
    sequence_length: int
    tokens: int
    phase: int

    @property
    def tokens_after(self) -> int:
        """Tokens seen when the step is done."""
        return self.tokens + self.sequences * self.sequence_length


class _Segment(NamedTuple):
    """Steps of one kind, from `step` on; `plan` is that of the first of them."""

    step: int
    plan: StepPlan

    def at(self, step: int) -> StepPlan:
        done = (step - self.step) * self.plan.sequences
        return self.plan._replace(
            first=self.plan.first + done, tokens=self.plan.tokens + done * self.plan.sequence_length
        )


class BatchPlan:
    """The global batch of every step, in whole numbers and without counting through the steps."""

    def __init__(
        self, sequences: int, ramp: list[tuple[int, int]], sequence_length: int, phases: list[tuple[int, int]] = ()
    ) -> None:
        """Work out where each size and each phase begins.

        Args:
            sequences: global batch at the start of the run.
            ramp: (tokens, sequences), tokens rising: the global batch from so many tokens on.
            sequence_length: tokens of a sequence at the start of the run, which is phase 0.
            phases: (tokens, sequence_length), tokens rising: the length of a sequence from so many tokens on, in
                phase 1, 2, ….
        Raises:
            UserError: a batch or length below 1, or tokens that do not rise.
        """
        _check_rising("batch.ramp", "sequences", ramp)
        _check_rising("data.phases", "tokens a sequence", phases)
        if sequences < 1:
            raise UserError(f"batch.sequences={sequences} must be at least 1")
        if sequence_length < 1:
            raise UserError(f"data.sequence_length={sequence_length} must be at least 1")
        changes = [(tokens, "sequences", value, 0) for tokens, value in ramp]
        changes += [(tokens, "sequence_length", value, phase) for phase, (tokens, value) in enumerate(phases, 1)]
        self._segments = [_Segment(0, StepPlan(0, sequences, sequence_length, 0, 0))]
        for tokens, name, value, phase in sorted(changes):
            last = self._segments[-1]
            steps = max(0, _divide_up(tokens - last.plan.tokens, last.plan.sequences * last.plan.sequence_length))
            plan = last.at(last.step + steps)._replace(**{name: value})
            self._segments.append(_Segment(last.step + steps, plan._replace(phase=phase or plan.phase)))

    def at(self, step: int) -> StepPlan:
        """The step after `step` steps."""
        return self._segments[bisect_right(self._segments, step, key=lambda segment: segment.step) - 1].at(step)

    def at_sequence(self, k: int) -> StepPlan:
        """The first step of the kind that sequence k belongs to: its length and phase are the sequence's."""
        return self._segments[bisect_right(self._segments, k, key=lambda segment: segment.plan.first) - 1].plan

    def segments(self, until_step: int) -> list[tuple[int, StepPlan]]:
        """The first step and those before `until_step` at which batch, length or phase changes, each with its plan."""
        changes = {segment.step: segment.plan for segment in self._segments if segment.step < until_step}
        return list(changes.items())  # of several changes at one step, the last has them all

    def steps_for_tokens(self, tokens: int) -> int:
        """The fewest steps that see at least so many tokens."""
        before = [segment for segment in self._segments if segment.plan.tokens < tokens]
        if not before:
            return 0
        step, plan = before[-1]
        return step + _divide_up(tokens - plan.tokens, plan.sequences * plan.sequence_length)

    def lengths(self) -> list[int]:
        """The lengths that sequences have in the course of the run, each once, in that order."""
        return list(dict.fromkeys(segment.plan.sequence_length for segment in self._segments))


def _check_rising(key: str, what: str, entries: list[tuple[int, int]]) -> None:
    last = 0
    for tokens, value in entries:
        if value < 1 or tokens <= last:
            raise UserError(
                f"{key} has {value} {what} from {tokens} tokens on, after {last} tokens; "
                f"each entry must begin later than the one before it and have at least 1"
            )
        last = tokens


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)
