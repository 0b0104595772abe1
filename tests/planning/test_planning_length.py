"""How long a run is, against walking it step by step."""

import pytest

from trinity.config.run import Batch, Data, RampEntry, Run, RunConfig
from trinity.planning.length import Load, Stretch, load_of, stretches


def run(steps: int | None, tokens: int | None, ramp: list[tuple[int, int]]) -> RunConfig:
    entries = [RampEntry(tokens=at, sequences=sequences) for at, sequences in ramp]
    batch = Batch(sequences=3, ramp=entries)
    return RunConfig(run=Run(steps=steps, tokens=tokens), data=Data(sequence_length=10), batch=batch)


@pytest.mark.parametrize(("steps", "tokens"), [(0, None), (1, None), (40, None), (None, 1), (None, 90), (None, 2000)])
@pytest.mark.parametrize("ramp", [[], [(1, 5)], [(90, 4), (100, 7)], [(61, 4), (62, 5), (500, 100)], [(10**6, 5)]])
def test_stretches(steps: int | None, tokens: int | None, ramp: list[tuple[int, int]]) -> None:
    """Against walking the run step by step."""
    config = run(steps, tokens, ramp)
    expected: list[Stretch] = []
    step = seen = 0
    while step < steps if tokens is None else seen < tokens:
        sequences = [3, *(size for at, size in ramp if at <= seen)][-1]
        if expected and expected[-1].sequences == sequences:
            expected[-1] = expected[-1]._replace(steps=expected[-1].steps + 1)
        else:
            expected.append(Stretch(step, seen, sequences, 1))
        step, seen = step + 1, seen + 10 * sequences
    assert stretches(config) == expected


def test_one_ranks_share() -> None:
    """24 sequences on 2 ranks, at most 5 at once: 4 divides 12 and 5 does not."""
    config = RunConfig(data=Data(sequence_length=10), batch=Batch(sequences=24, microbatch=5))
    assert load_of(config, 24, 2) == Load(rows=12, microbatch=4, microbatches=3, tokens=120)
