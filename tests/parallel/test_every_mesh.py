"""The same run on any mesh: data, routes, counts, raw gradients, norm, weights, biases and state equal one process.

In float64, to 1e-10: rounding is 1e-16, Newton-Schulz amplifies it by some 500 a step, and five steps follow.
In fp32 the same amplification of 1e-7 leaves what FP32_BOUND says, measured; in bf16 a route would flip, so there one
step is compared and its routes are forced.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mesh_runs import MISTAKES, alone, assert_same, run_steps

STEPS = 5
FLOAT64 = ["precision.compute=float64", "optim.muon.dtype=float64"]
FP32_BOUND = 3e-5  # of the largest value of a tensor; 8e-6 measured over these meshes
BF16_BOUND = 1e-2  # 3e-3 measured: a rank's gradients are rounded to 8 bits before they are added in fp32
# the clip at 0.5 bites in every step, the batch of 12 gives 2 ranks 6 rows and 4 ranks 3
BATCH = ["batch.sequences=12", "batch.ramp=[]"]
FEW_EXPERTS = ["model.experts=3"]
TWO_EXPERTS = ["model.experts=2", "model.active_experts=1"]

MESHES: dict[str, tuple[int, list[str]]] = {
    "shard 2": (2, ["parallel.shard=2"]),
    "shard 4": (4, ["parallel.shard=4"]),
    "replicate 2 × shard 2": (4, ["parallel.replicate=2", "parallel.shard=2"]),
    "shard 2, expert 2": (2, ["parallel.shard=2", "parallel.expert=2"]),
    "shard 4, expert 2": (4, ["parallel.shard=4", "parallel.expert=2"]),
    "shard 4, expert 4": (4, ["parallel.shard=4", "parallel.expert=4"]),
    "replicate 2 × shard 2, expert 2": (4, ["parallel.replicate=2", "parallel.shard=2", "parallel.expert=2"]),
    "more shards than experts": (4, ["parallel.shard=4", *FEW_EXPERTS]),
    "more shards than experts, expert 2": (4, ["parallel.shard=4", "parallel.expert=2", *TWO_EXPERTS]),
}


@pytest.fixture(scope="module")
def settings(recipe: Callable[[Path], dict], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The full recipe: Muon, clipping, SMEBU, both extra losses, document mask, uneven targets."""
    return recipe(tmp_path_factory.mktemp("mesh") / "run")


@pytest.fixture(scope="module")
def expected(settings: dict) -> Callable[[list[str], int], dict[str, Any]]:
    """expected(words, steps): what one process does, computed once for each."""
    done: dict[tuple, dict[str, Any]] = {}

    def once(words: list[str], steps: int) -> dict[str, Any]:
        model = [word for word in words if not word.startswith(("parallel.", "recompute=", "batch.microbatch="))]
        key = (*model, steps)
        if key not in done:
            done[key] = alone(settings, [*model, "batch.microbatch=12"], steps)
        return done[key]

    return once


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("mesh", MESHES)
def test_equals_one_process(
    settings: dict, processes: Callable, expected: Callable, mesh: str, recompute: str, microbatches: int
) -> None:
    """The grid. Gradients of several microbatches are reduced after each, or (where blocks are recomputed) once."""
    world, words = MESHES[mesh]
    defer = "on" if recompute == "block" else "off"
    words = [*FLOAT64, *BATCH, *words, f"batch.microbatch={12 // world // microbatches}"]
    words += [f"recompute={recompute}", f"parallel.defer_reduce={defer}"]
    runs = processes(world).run(run_steps, settings, words, STEPS)
    assert_same(runs, expected(words, STEPS))


@pytest.mark.parametrize("mesh", MESHES)
def test_in_fp32(settings: dict, processes: Callable, expected: Callable, mesh: str) -> None:
    """Two steps of the recipe as it is run on a CPU."""
    world, words = MESHES[mesh]
    words = [*BATCH, *words, f"batch.microbatch={12 // world}"]
    runs = processes(world).run(run_steps, settings, words, 2)
    assert_same(runs, expected(words, 2), FP32_BOUND)


@pytest.mark.parametrize("mesh", MESHES)
def test_one_step_in_bf16(settings: dict, processes: Callable, expected: Callable, mesh: str) -> None:
    """As on a GPU: bf16 compute under fp32 masters, routes forced to those of one process in float64.

    Raw gradients, counts and figures; the weights after so small a step would agree whatever it was.
    """
    world, words = MESHES[mesh]
    model = [word for word in words if word.startswith("model.")]
    routes = expected([*FLOAT64, *BATCH, *model], STEPS)["routes"]
    words = [*BATCH, "precision.compute=bfloat16", *words]
    one = alone(settings, [*BATCH, "precision.compute=bfloat16", *model, "batch.microbatch=12"], 1, routes)
    runs = processes(world).run(run_steps, settings, [*words, f"batch.microbatch={12 // world}"], 1, None, routes)
    assert_same(runs, one, BF16_BOUND, state=False)


@pytest.mark.parametrize("wrong", MISTAKES)
def test_mistakes_are_caught(settings: dict, processes: Callable, expected: Callable, wrong: str) -> None:
    """The comparison that the grid makes fails for each, in one step."""
    world, mesh = MESHES["shard 4, expert 2"]
    words = [*FLOAT64, *BATCH, *mesh, "batch.microbatch=3"]
    with pytest.raises(AssertionError):
        assert_same(processes(world).run(run_steps, settings, words, 1, wrong), expected(words, 1))
