"""The stretches of a plan are the run's own schedule: by hand, and against BatchPlan walked step by step."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from trinity.config.model import ModelConfig
from trinity.config.run import BatchConfig, DataConfig, DataPhaseConfig, RampEntryConfig, RunConfig, RunSection
from trinity.models.flops import flops_per_token
from trinity.planning.plan import make_plan
from trinity.planning.stretches import Load, Stretch, load_of, stretches
from trinity.planning.tables import as_text, as_values
from trinity.training.build import batch_plan, total_steps


def run(
    steps: int | None, tokens: int | None, ramp: list[tuple[int, int]], phases: list[tuple[int, int | None]] = ()
) -> RunConfig:
    """Three sequences of 10 tokens at the start."""
    data = DataConfig(train={"a": "x", "b": "y"}, sequence_length=10)
    data.phases = [DataPhaseConfig(tokens=at, mixture={"a": 1.0}, sequence_length=length) for at, length in phases]
    entries = [RampEntryConfig(tokens=at, sequences=sequences) for at, sequences in ramp]
    return RunConfig(
        run=RunSection(steps=steps, tokens=tokens), data=data, batch=BatchConfig(sequences=3, ramp=entries)
    )


def test_by_hand() -> None:
    """30 tokens a step; from 90 on 4 × 10, from 120 on 4 × 20, until 300 are seen; a mixture alone cuts nothing."""
    config = run(None, 300, [(70, 4)], [(50, None), (120, 20)])
    assert stretches(config) == [
        Stretch(step=0, token=0, sequences=3, sequence_length=10, steps=3),
        Stretch(step=3, token=90, sequences=4, sequence_length=10, steps=1),
        Stretch(step=4, token=130, sequences=4, sequence_length=20, steps=3),
    ]
    assert [stretch.tokens for stretch in stretches(config)] == [90, 40, 240]


def cases() -> list[RunConfig]:
    """Ramps and phases at random, a run by steps or by tokens; and both at one token count."""
    draw = random.Random(0)
    found = [run(0, None, []), run(40, None, [(61, 5)], [(61, 7)]), run(None, 2000, [(90, 4), (100, 7)])]
    for _ in range(40):
        ramp = [(at, draw.randint(1, 9)) for at in sorted(draw.sample(range(1, 900), draw.randint(0, 3)))]
        phases = [(at, draw.choice([None, 5, 20, 33])) for at in sorted(draw.sample(range(1, 900), draw.randint(0, 3)))]
        by_steps = draw.random() < 0.5
        found.append(run(*((draw.randint(1, 40), None) if by_steps else (None, draw.randint(1, 1200))), ramp, phases))
    return found


@pytest.mark.parametrize("config", cases())
def test_is_the_runs_schedule(config: RunConfig) -> None:
    """Every step has the batch and length that BatchPlan gives it; steps and tokens in all are the run's."""
    plan = batch_plan(config)
    total = total_steps(config, plan)
    found = stretches(config)
    for stretch in found:
        for step in range(stretch.step, stretch.step + stretch.steps):
            at = plan.at(step)
            assert (at.sequences, at.sequence_length) == (stretch.sequences, stretch.sequence_length)
    assert [stretch.token for stretch in found] == [plan.at(stretch.step).tokens for stretch in found]
    assert sum(stretch.steps for stretch in found) == total
    assert sum(stretch.tokens for stretch in found) == plan.at(total).tokens
    kinds = [stretch[2:4] for stretch in found]
    assert all(one != other for one, other in pairwise(kinds))


def test_one_ranks_share() -> None:
    """24 sequences on 2 ranks, at most 5 at once: 4 divides 12 and 5 does not."""
    config = RunConfig(data=DataConfig(sequence_length=10), batch=BatchConfig(sequences=24, microbatch=5))
    assert load_of(config, Stretch(0, 0, 24, 10, 1), 2) == Load(rows=12, microbatch=4, microbatches=3, tokens=120)


def test_a_longer_phase_is_planned(tiny: ModelConfig) -> None:
    """Memory, FLOPs and seconds of a phase of 64 are those of a run of 64; the verdict is the worst stretch's."""
    short = RunConfig(
        model=tiny,
        run=RunSection(steps=40),
        data=DataConfig(train={"a": "x"}, sequence_length=16),
        batch=BatchConfig(sequences=8),
    )
    longer = replace(short, data=replace(short.data, sequence_length=64))
    phase = DataPhaseConfig(tokens=16 * 8 * 10, sequence_length=64)
    both = make_plan(replace(short, data=replace(short.data, phases=[phase])))
    alone = [make_plan(config).steps[0] for config in (short, longer)]
    assert [step.stretch.steps for step in both.steps] == [10, 30]
    for step, own in zip(both.steps, alone, strict=True):
        assert step.memory == own.memory
        assert step.seconds == own.seconds
        assert step.flops == own.flops
    assert both.steps[1].flops == flops_per_token(tiny, 64)
    assert both.memory == alone[1].memory != alone[0].memory
    assert both.total_seconds == 10 * alone[0].seconds.step + 30 * alone[1].seconds.step
    values = as_values(both)
    assert [step["memory"]["total"] for step in values["steps"]] == [step.memory.total for step in alone]
    assert values["memory"]["total"] == alone[1].memory.total
    text = as_text(both)
    assert "rows of 16  of total  rows of 64  of total" in text
    assert f"{16 * 8 * 10 + 64 * 8 * 30:,} tokens" in text
