"""The run cut where its batch or sequence length changes, by the run's own schedule; one rank's part of a step."""

from typing import NamedTuple

from trinity.config.run import RunConfig
from trinity.training.build import batch_plan, total_steps
from trinity.training.divisibility import microbatch_size


class Stretch(NamedTuple):
    """Steps of one global batch and one length: the step and the token count they begin at, and how many they are.

    sequences: of a global batch. sequence_length: tokens of each.
    """

    step: int
    token: int
    sequences: int
    sequence_length: int
    steps: int

    @property
    def tokens(self) -> int:
        """Of all its steps."""
        return self.steps * self.sequences * self.sequence_length


class Load(NamedTuple):
    """One rank's part of a step: rows in all, rows at once, how many times, and tokens in all."""

    rows: int
    microbatch: int
    microbatches: int
    tokens: int


def stretches(config: RunConfig) -> list[Stretch]:
    """The run by trinity.data.batches.BatchPlan; phases that change neither batch nor length do not cut it.

    A run of no steps has one stretch, of no steps.
    """
    plan = batch_plan(config)
    end = total_steps(config, plan)
    first = plan.at(0)
    found = [Stretch(0, 0, first.sequences, first.sequence_length, end)]
    for step, at in plan.segments(end):
        last = found[-1]
        if (at.sequences, at.sequence_length) != (last.sequences, last.sequence_length):
            found[-1] = last._replace(steps=step - last.step)
            found.append(Stretch(step, at.tokens, at.sequences, at.sequence_length, end - step))
    return found


def load_of(config: RunConfig, stretch: Stretch, ranks: int) -> Load:
    """What each of the ranks gets of a step; its global batch divides by them."""
    rows = stretch.sequences // ranks
    size = microbatch_size(rows, config.batch.microbatch)
    return Load(rows, size, rows // size, rows * stretch.sequence_length)
