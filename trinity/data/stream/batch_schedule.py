"""The batch schedule: the global batch of every optimizer step, the length of its sequences, and its data phase.

The report: Nano and Mini 4096 sequences, then 8192; Large 12288, and 16384 after 4.9T tokens; longer sequences in
context extension. A change at a token count takes effect at the first step that starts with at least that many tokens.

A run that resumes with another batch, ramp or phases keeps the steps it has made: its checkpoints hold their history,
and the new schedule starts where the history ends.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from trinity.errors import UserError


class StepPlan(NamedTuple):
    """One step.

    first: number of its first sequence.
    sequences: how many.
    sequence_length: tokens of each.
    tokens: tokens seen before the step.
    phase: its data phase.
    """

    first: int
    sequences: int
    sequence_length: int
    tokens: int
    phase: int

    @property
    def tokens_after(self) -> int:
        """Tokens seen after the step."""
        return self.tokens + self.sequences * self.sequence_length


class Segment(NamedTuple):
    """Equal steps from `step` on; `plan` is the first step's."""

    step: int
    plan: StepPlan

    def at(self, step: int) -> StepPlan:
        """The step after `step` steps, where it belongs to this segment."""
        done = (step - self.step) * self.plan.sequences
        return self.plan._replace(
            first=self.plan.first + done, tokens=self.plan.tokens + done * self.plan.sequence_length
        )


class BatchHistory(NamedTuple):
    """The steps that a run has made: segments of equal steps, and the end.

    step, sequences, tokens: at the end, steps made, sequences and tokens read.
    """

    segments: tuple[Segment, ...] = ()
    step: int = 0
    sequences: int = 0
    tokens: int = 0

    def rows(self) -> list[list[int]]:
        """[segments + 1, 6] integers for a checkpoint: step and StepPlan of each segment, then of the end.

        The end has 0 sequences, length 0 and phase 0.
        """
        end = Segment(self.step, StepPlan(self.sequences, 0, 0, self.tokens, 0))
        return [[segment.step, *segment.plan] for segment in (*self.segments, end)]

    @classmethod
    def from_rows(cls, rows: list[list[int]]) -> "BatchHistory":
        """The inverse of `rows`."""
        *segments, end = [Segment(step, StepPlan(*plan)) for step, *plan in rows]
        return cls(tuple(segments), end.step, end.plan.first, end.plan.tokens)


class BatchPlan:
    """The batch schedule of a run, in integers; any step is found without counting through the steps before it."""

    def __init__(
        self,
        sequences: int,
        ramp: Sequence[tuple[int, int]],
        sequence_length: int,
        phases: Sequence[tuple[int, int]] = (),
        history: BatchHistory = BatchHistory(),  # noqa: B008 (immutable)
    ) -> None:
        """Compute where each batch size and each phase begins.

        Args:
            sequences: global batch at the start of the run.
            ramp: (tokens, sequences), tokens rising: the global batch from that token count on.
            sequence_length: tokens of a sequence at the start of the run, which is phase 0.
            phases: (tokens, sequence_length), tokens rising: the length of a sequence from that token count on, in
                phase 1, 2, ….
            history: steps made before, by any schedule; the other arguments apply from its end on.
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
        """The first step of the segment that contains sequence k; its length and phase are those of the sequence."""
        return self._segments[bisect_right(self._segments, k, key=lambda segment: segment.plan.first) - 1].plan

    def segments(self, until_step: int) -> list[tuple[int, StepPlan]]:
        """The steps before `until_step` that begin a segment (another batch, length or phase), each with its plan."""
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
        """The sequence lengths of the run, each once, in the order of their first use."""
        return list(dict.fromkeys(segment.plan.sequence_length for segment in self._segments))


def _merged(segments: list[Segment]) -> list[Segment]:
    """The same steps without empty segments and without segments that continue the one before."""
    used = [segment for segment, following in pairwise(segments) if following.step > segment.step] + segments[-1:]
    return [
        segment
        for before, segment in zip([None, *used], used)
        if before is None or before.at(segment.step) != segment.plan
    ]


def _check_rising(key: str, what: str, entries: Sequence[tuple[int, int]]) -> None:
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
