"""Segments of the schedule: against values by hand, and against BatchPlan step by step."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from trinity.config.model import ModelConfig
from trinity.config.run import BatchConfig, DataConfig, DataPhaseConfig, RampEntryConfig, RunConfig, RunSection
from trinity.models.flops import flops_per_token
from trinity.planning.plan import make_plan
from trinity.planning.schedule_segments import RankLoad, ScheduleSegment, rank_load, schedule_segments
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
    """30 tokens a step; 4 × 10 from token 90, 4 × 20 from token 120, to token 300; a new mixture starts no segment."""
    config = run(None, 300, [(70, 4)], [(50, None), (120, 20)])
    assert schedule_segments(config) == [
        ScheduleSegment(step=0, token=0, sequences=3, sequence_length=10, steps=3),
        ScheduleSegment(step=3, token=90, sequences=4, sequence_length=10, steps=1),
        ScheduleSegment(step=4, token=130, sequences=4, sequence_length=20, steps=3),
    ]
    assert [segment.tokens for segment in schedule_segments(config)] == [90, 40, 240]


def random_runs() -> list[RunConfig]:
    """Random ramps and phases, runs by steps and by tokens; one with ramp and phase at the same token count."""
    draw = random.Random(0)
    configs = [run(0, None, []), run(40, None, [(61, 5)], [(61, 7)]), run(None, 2000, [(90, 4), (100, 7)])]
    for _ in range(40):
        ramp = [(at, draw.randint(1, 9)) for at in sorted(draw.sample(range(1, 900), draw.randint(0, 3)))]
        phases = [(at, draw.choice([None, 5, 20, 33])) for at in sorted(draw.sample(range(1, 900), draw.randint(0, 3)))]
        by_steps = draw.random() < 0.5
        configs.append(run(*((draw.randint(1, 40), None) if by_steps else (None, draw.randint(1, 1200))), ramp, phases))
    return configs


@pytest.mark.parametrize("config", random_runs())
def test_segments_match_the_batch_schedule(config: RunConfig) -> None:
    """Every step has BatchPlan's batch and length; total steps and tokens equal the run's."""
    plan = batch_plan(config)
    total = total_steps(config, plan)
    segments = schedule_segments(config)
    for segment in segments:
        for step in range(segment.step, segment.step + segment.steps):
            at = plan.at(step)
            assert (at.sequences, at.sequence_length) == (segment.sequences, segment.sequence_length)
    assert [segment.token for segment in segments] == [plan.at(segment.step).tokens for segment in segments]
    assert sum(segment.steps for segment in segments) == total
    assert sum(segment.tokens for segment in segments) == plan.at(total).tokens
    shapes = [segment[2:4] for segment in segments]
    assert all(before != after for before, after in pairwise(shapes))


def test_rank_load() -> None:
    """24 sequences on 2 ranks, microbatch at most 5: 4 divides 12 and 5 does not."""
    config = RunConfig(data=DataConfig(sequence_length=10), batch=BatchConfig(sequences=24, microbatch=5))
    load = rank_load(config, ScheduleSegment(0, 0, 24, 10, 1), 2)
    assert load == RankLoad(rows=12, microbatch=4, microbatches=3, tokens=120)


def test_phase_with_longer_sequences(tiny: ModelConfig) -> None:
    """Memory, FLOPs and seconds of a phase of length 64 equal a run of length 64; the longer one sets the peak."""
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
    assert [step.segment.steps for step in both.steps] == [10, 30]
    for step, expected in zip(both.steps, alone, strict=True):
        assert step.memory == expected.memory
        assert step.seconds == expected.seconds
        assert step.flops == expected.flops
    assert both.steps[1].flops == flops_per_token(tiny, 64)
    assert both.memory == alone[1].memory != alone[0].memory
    assert both.total_seconds == 10 * alone[0].seconds.step + 30 * alone[1].seconds.step
    values = as_values(both)
    assert [step["memory"]["total"] for step in values["steps"]] == [step.memory.total for step in alone]
    assert values["memory"]["total"] == alone[1].memory.total
    text = as_text(both)
    assert "rows of 16  of total  rows of 64  of total" in text
    assert f"{16 * 8 * 10 + 64 * 8 * 30:,} tokens" in text
