"""How long a run is, cut where its global batch grows, and what one rank gets of a step."""

from itertools import pairwise
from typing import NamedTuple

from trinity.config.run import RunConfig
from trinity.training.setup import microbatch_size


class Stretch(NamedTuple):
    """Steps of one global batch size: the step and the token count they begin at, and how many they are."""

    step: int
    token: int
    sequences: int
    steps: int


class Load(NamedTuple):
    """One rank's part of a step: rows in all, rows at once, how many times, and tokens in all."""

    rows: int
    microbatch: int
    microbatches: int
    tokens: int


def stretches(config: RunConfig) -> list[Stretch]:
    """The run, cut where its global batch grows: at the first step that begins at or after a ramp entry's tokens.

    The last stretch ends with the run: after run.steps, or with the step that reaches run.tokens.
    """
    batches = [(0, config.batch.sequences), *((entry.tokens, entry.sequences) for entry in config.batch.ramp)]
    step = token = 0
    found = []
    for (_, sequences), (following, _) in pairwise([*batches, (None, 0)]):
        per_step = sequences * config.data.sequence_length
        ends = [end for end in (following, config.run.tokens) if end is not None]
        limits = [max(0, -(-(end - token) // per_step)) for end in ends]  # rounded up
        if config.run.steps is not None:
            limits.append(config.run.steps - step)
        steps = min(limits)
        if steps:
            found.append(Stretch(step, token, sequences, steps))
        step, token = step + steps, token + steps * per_step
    return found


def load_of(config: RunConfig, sequences: int, ranks: int) -> Load:
    """What each of so many ranks gets of a global batch that divides by them."""
    rows = sequences // ranks
    size = microbatch_size(rows, config.batch.microbatch)
    return Load(rows, size, rows // size, rows * config.data.sequence_length)
