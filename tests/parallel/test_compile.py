"""Compiled blocks compute what uncompiled ones do, on a mesh with split experts too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mesh_runs import alone, assert_same, run_steps
from torch._dynamo.utils import counters

# The same sums in another order, rounded to fp32: as another mesh (test_every_mesh.FP32_BOUND).
BOUND = 1e-5
# AdamW with a wide ε, as in test_every_mesh.WIDE_EPSILON: at its usual one it makes a step of what is rounding alone.
WORDS = ["optim.adamw.eps=1e-4", "batch.sequences=4", "batch.ramp=[]", "batch.microbatch=2", "model.layers=3"]


def compiled_steps(settings: dict, words: list[str], steps: int) -> dict[str, Any]:
    """run_steps, and how many graphs were compiled on the way."""
    counters["stats"].clear()
    return run_steps(settings, words, steps) | {"graphs": counters["stats"]["unique_graphs"]}


@pytest.mark.slow
def test_compiled_blocks(recipe: Callable, processes: Callable, tmp_path: Path) -> None:
    """Two steps on two processes that split the experts, against one that compiles nothing; and graphs there are."""
    settings = recipe(tmp_path / "run")
    words = [*WORDS, "compile=block", "parallel.expert=2"]
    runs = processes(2).run(compiled_steps, settings, words, 2)
    assert all(run["graphs"] for run in runs)
    assert_same(runs, alone(settings, WORDS, 2), BOUND)
