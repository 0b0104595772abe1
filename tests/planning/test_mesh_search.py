"""GPU counts that a config runs on."""

from dataclasses import replace
from pathlib import Path

import pytest

from trinity.config import load_config
from trinity.config.model import ModelConfig
from trinity.config.run import BatchConfig, DataConfig, ParallelConfig, RampEntryConfig, RunConfig
from trinity.errors import UserError
from trinity.planning.mesh_search import check_gpus, min_gpus
from trinity.training.divisibility import process_counts

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("parallel", "numbers"),
    [
        # 24 and 36 sequences and 48 streams divide by 1, 2, 3, 4, 6, 12; six experts of width 10 in one share by
        # 1, 2, 3, 6 and by their width, 1, 2, 5, 10
        (ParallelConfig(shard=-1), [1, 2, 3, 6]),
        (ParallelConfig(shard=-1, replicate=2), [2, 4, 6, 12]),
        (ParallelConfig(shard=2, replicate=-1), [2, 4, 6, 12]),
        (ParallelConfig(shard=-1, expert=2), [2, 4, 6]),  # three experts in a share: 1, 3, or 2 by width
        (ParallelConfig(shard=4, expert=2, replicate=3), [12]),
        (ParallelConfig(shard=5, replicate=1), []),
    ],
)
def test_gpu_counts(tiny: ModelConfig, parallel: ParallelConfig, numbers: list[int]) -> None:
    """By hand; each of these counts is accepted, all others are refused with the list."""
    batch = BatchConfig(sequences=24, ramp=[RampEntryConfig(tokens=100, sequences=36)])
    config = RunConfig(model=tiny, parallel=parallel, batch=batch, data=DataConfig(streams=48))
    assert process_counts(config) == numbers
    for gpus in range(1, 14):
        if gpus in numbers:
            sizes = check_gpus(config, gpus)
            assert sizes.replicate * sizes.shard == gpus
        else:
            ending = f", or start {' or '.join(map(str, numbers))} process{'es' * (numbers[-1] > 1)}" if numbers else ""
            with pytest.raises(UserError) as refused:
                check_gpus(config, gpus)
            assert str(refused.value).endswith(ending)
            assert ("start" in str(refused.value)) == bool(numbers)


def test_reasons_of_refusals(tiny: ModelConfig) -> None:
    """A ramp entry, the streams; each message names a setting that works."""
    config = RunConfig(model=tiny, batch=BatchConfig(sequences=12, ramp=[RampEntryConfig(tokens=9, sequences=15)]))
    with pytest.raises(UserError) as refused:
        check_gpus(config, 2)
    assert str(refused.value) == (
        "batch.ramp[0].sequences=15 does not divide by 2 data ranks; "
        "use 'batch.ramp=[{tokens: 9, sequences: 16}]', or start 1 or 3 processes"
    )
    with pytest.raises(UserError) as refused:
        check_gpus(replace(config, batch=BatchConfig(sequences=15), parallel=ParallelConfig(shard=5)), 5)
    assert str(refused.value) == "data.streams=48 does not divide by 5 data ranks; use data.streams=50"
    with pytest.raises(UserError, match="--gpus 0 must be at least 1"):
        check_gpus(config, 0)


@pytest.mark.parametrize(("name", "needed", "meant"), [("large", 128, 2048), ("mini", 128, 512), ("nano_1gpu", 1, 1)])
def test_configs(name: str, needed: int, meant: int) -> None:
    """The repository's configs run on their intended GPU counts."""
    config = load_config(CONFIGS / f"{name}.yaml")
    assert min_gpus(config) == needed
    assert {needed, meant} <= set(process_counts(config))
