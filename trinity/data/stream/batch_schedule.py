"""Which sequences make which optimizer step: the global batch, how long its sequences are, and how both change.

The report: Nano and Mini 4096 sequences, then 8192; Large 12288, and 16384 after 4.9T tokens; longer sequences in
context extension. Whatever begins at a token count begins with the first step that starts with at least that many seen.

A run that goes on with another batch, ramp or phases keeps the steps it has made: their history is in its checkpoints,
and the new schedule starts where the history ends.
"""

from bisect import bisect_right
from itertools import pairwise
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


class Segment(NamedTuple):
    """Steps of one kind, from `step` on; `plan` is that of the first of them."""

    step: int
    plan: StepPlan

    def at(self, step: int) -> StepPlan:
        """The step after `step` steps, if it is of this kind."""
        done = (step - self.step) * self.plan.sequences
        return self.plan._replace(
            first=self.plan.first + done, tokens=self.plan.tokens + done * self.plan.sequence_length
        )


class BatchHistory(NamedTuple):
    """The steps that a run has made: segments of equal steps, and where they end.

    step, sequences, tokens: how many were made and read.
    """

    segments: tuple[Segment, ...] = ()
    step: int = 0
    sequences: int = 0
    tokens: int = 0

    def rows(self) -> list[list[int]]:
        """[segments + 1, 6] integers for a checkpoint: step and StepPlan of each segment, then of the end.

        The end has 0 sequences of length 0 and phase 0.
        """
        end = Segment(self.step, StepPlan(self.sequences, 0, 0, self.tokens, 0))
        return [[segment.step, *segment.plan] for segment in (*self.segments, end)]

    @classmethod
    def from_rows(cls, rows: list[list[int]]) -> "BatchHistory":
        """The inverse of `rows`."""
        *segments, end = [Segment(step, StepPlan(*plan)) for step, *plan in rows]
        return cls(tuple(segments), end.step, end.plan.first, end.plan.tokens)


class BatchPlan:
    """The global batch of every step, in whole numbers and without counting through the steps."""

    def __init__(
        self,
        sequences: int,
        ramp: list[tuple[int, int]],
        sequence_length: int,
        phases: list[tuple[int, int]] = (),
        history: BatchHistory = BatchHistory(),  # noqa: B008 (immutable)
    ) -> None:
        """Compute where each size and each phase begins.

        Args:
            sequences: global batch at the start of the run.
            ramp: (tokens, sequences), tokens rising: the global batch from that token count on.
            sequence_length: tokens of a sequence at the start of the run, which is phase 0.
            phases: (tokens, sequence_length), tokens rising: the length of a sequence from that token count on, in
                phase 1, 2, ….
            history: steps made before, whatever the schedule was then; the other arguments hold from its end on.
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
        begin = StepPlan(history.sequences, sequences, sequence_length, history.tokens, 0)
        self._segments = [*history.segments, Segment(history.step, begin)]
        for tokens, name, value, phase in sorted(changes):
            last = self._segments[-1]
            steps = max(0, _divide_up(tokens - last.plan.tokens, last.plan.sequences * last.plan.sequence_length))
            plan = last.at(last.step + steps)._replace(**{name: value})
            self._segments.append(Segment(last.step + steps, plan._replace(phase=phase or plan.phase)))
        self._segments = _merged(self._segments)

    def at(self, step: int) -> StepPlan:
        """The step after `step` steps."""
        return self._segments[bisect_right(self._segments, step, key=lambda segment: segment.step) - 1].at(step)

    def at_sequence(self, k: int) -> StepPlan:
        """The first step of the kind that sequence k belongs to: its length and phase are the sequence's."""
        return self._segments[bisect_right(self._segments, k, key=lambda segment: segment.plan.first) - 1].plan

    def segments(self, until_step: int) -> list[tuple[int, StepPlan]]:
        """The first step and those before `until_step` at which batch, length or phase changes, each with its plan."""
        return [(segment.step, segment.plan) for segment in self._segments if segment.step < until_step]

    def steps_for_tokens(self, tokens: int) -> int:
        """The fewest steps that see at least `tokens` tokens."""
        before = [segment for segment in self._segments if segment.plan.tokens < tokens]
        if not before:
            return 0
        step, plan = before[-1]
        return step + _divide_up(tokens - plan.tokens, plan.sequences * plan.sequence_length)

    def history(self, step: int) -> BatchHistory:
        """The first `step` steps."""
        begun = tuple(segment for segment in self._segments if segment.step < step)
        end = self.at(step)
        return BatchHistory(begun, step, end.first, end.tokens)

    def lengths(self) -> list[int]:
        """The lengths that sequences have in the course of the run, each once, in that order."""
        return list(dict.fromkeys(segment.plan.sequence_length for segment in self._segments))


def _merged(segments: list[Segment]) -> list[Segment]:
    """The same steps without segments that have none, or that go on as the one before them."""
    used = [segment for segment, following in pairwise(segments) if following.step > segment.step] + segments[-1:]
    return [
        segment
        for before, segment in zip([None, *used], used)
        if before is None or before.at(segment.step) != segment.plan
    ]


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
