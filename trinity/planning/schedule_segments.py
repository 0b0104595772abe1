"""Segments of a run with a constant global batch and sequence length, and one rank's share of a step.

They are read from the run's own batch schedule (trinity.data.stream.batch_schedule), so ramp and phases are included.
"""

from typing import NamedTuple

from trinity.config.run import RunConfig
from trinity.training.build import batch_plan, total_steps
from trinity.training.divisibility import microbatch_size


class ScheduleSegment(NamedTuple):
    """Consecutive steps with the same global batch and sequence length.

    step, token: steps and tokens of the run before the segment.
    sequences: global batch. sequence_length: tokens of a sequence. steps: length of the segment.
    """

    step: int
    token: int
    sequences: int
    sequence_length: int
    steps: int

    @property
    def tokens(self) -> int:
        """Tokens of all steps of the segment."""
        return self.steps * self.sequences * self.sequence_length


class RankLoad(NamedTuple):
    """One rank's share of a step: rows, rows of a microbatch, number of microbatches, and tokens of all rows.

    With context parallelism its tokens are a part of its rows.
    """

    rows: int
    microbatch: int
    microbatches: int
    tokens: int


def schedule_segments(config: RunConfig) -> list[ScheduleSegment]:
    """The segments of a run in order; a data phase that changes neither batch nor length starts no segment.

    A run of zero steps has one segment of zero steps.
    """
    schedule = batch_plan(config)
    end = total_steps(config, schedule)
    first = schedule.at(0)
    segments = [ScheduleSegment(0, 0, first.sequences, first.sequence_length, end)]
    for step, plan in schedule.segments(end):
        last = segments[-1]
        if (plan.sequences, plan.sequence_length) != (last.sequences, last.sequence_length):
            segments[-1] = last._replace(steps=step - last.step)
            segments.append(ScheduleSegment(step, plan.tokens, plan.sequences, plan.sequence_length, end - step))
    return segments


def rank_load(config: RunConfig, segment: ScheduleSegment, ranks: int) -> RankLoad:
    """Each rank's share of a step of the segment; `ranks` / parallel.context must divide the global batch."""
    context = config.parallel.context
    rows = segment.sequences * context // ranks
    microbatch = microbatch_size(rows, config.batch.microbatch)
    return RankLoad(rows, microbatch, rows // microbatch, rows * segment.sequence_length // context)
