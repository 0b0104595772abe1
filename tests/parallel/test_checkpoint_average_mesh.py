"""checkpoint.average on two processes, sharded with expert and with context parallelism, equals one process.

In float64; the bound is that of test_every_mesh.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parallel.mesh_runs import BOUND
from tests.parallel.saving_runs import on_ranks, plain_run

WORDS = [
    "precision.compute=float64", "optim.muon.dtype=float64", "batch.sequences=4", "batch.ramp=[]", "run.steps=6",
    "checkpoint.every=2", "checkpoint.average={every: 2, window: 2, decay: cosine}", "evaluation.every=1",
]  # fmt: skip
"""Step 5 is evaluated and not saved: a save would free what FSDP has gathered."""
FIELDS = ("loss", "validation_loss.held_out", "validation_loss_average.held_out")


@pytest.fixture(scope="module")
def one_process(recipe: Callable, processes: Callable, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The lines of one process."""
    return lines_of(recipe, processes, 1, tmp_path_factory.mktemp("one") / "run", [])


def lines_of(recipe: Callable, processes: Callable, world: int, run: Path, words: list[str]) -> list[dict]:
    """The compared fields of metrics.jsonl."""
    assert on_ranks(processes, world, plain_run, recipe(run), [*WORDS, *words]) == [0] * world
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in FIELDS if name in line} for line in lines]


@pytest.mark.parametrize("words", [["parallel.shard=2", "parallel.expert=2"], ["parallel.context=2"]])
def test_two_processes(
    recipe: Callable, processes: Callable, one_process: list[dict], tmp_path: Path, words: list[str]
) -> None:
    """What FSDP keeps gathered after an evaluation is not taken for the average, nor the average for the weights."""
    lines = lines_of(recipe, processes, 2, tmp_path / "run", words)
    assert [FIELDS[2] in line for line in lines] == [False, False, False, True, True, True]
    assert abs(lines[5][FIELDS[2]] - lines[5][FIELDS[1]]) > 1e-3  # far above the bound
    for line, expected in zip(lines, one_process, strict=True):
        assert line == pytest.approx(expected, rel=BOUND)
