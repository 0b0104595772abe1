"""train.only: the trained part has the full run's gradients, the rest stays bit for bit; on one process and on meshes.

In float64: gradients of one run with and without frozen parameters are sums of the same terms, some in another order,
and meshes are compared as in test_every_mesh.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.mesh_runs import assert_same, config_of, run_steps, run_steps_alone
from trinity.models import Trinity
from trinity.models.freeze import trained_parameters

FLOAT64 = ["precision.compute=float64", "optim.muon.dtype=float64", "batch.sequences=12", "batch.ramp=[]"]
# of every FSDP group a part: a router without its norms, one of two stacks, one projection of a block; and all of none
MIXED = ["blocks.1.ffn.experts", "blocks.2.ffn.experts.down", "blocks.*.attention.out", "blocks.2.ffn.router", "head"]
LATE = ["blocks.2.ffn.experts", "norm"]  # nothing before the last block has a backward pass
SCALE = 1e-12  # of a tensor's largest value: rounding of 1e-16 in sums of some thousand terms

MESHES: dict[str, tuple[int, list[str]]] = {
    "shard 4, expert 2": (4, ["parallel.shard=4", "parallel.expert=2"]),
    "replicate 2 × shard 2, expert 2": (4, ["parallel.replicate=2", "parallel.shard=2", "parallel.expert=2"]),
    "shard 2, context 2, expert 2": (4, ["parallel.shard=2", "parallel.context=2", "parallel.expert=2"]),
}


@pytest.fixture(scope="module")
def settings(recipe: Callable[[Path], dict], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The full recipe."""
    return recipe(tmp_path_factory.mktemp("train_only") / "run")


@pytest.fixture(scope="module")
def full(settings: dict) -> dict[str, Any]:
    """One step of one process without frozen parameters."""
    return run_steps_alone(settings, FLOAT64, 1)


def only(names: list[str]) -> str:
    """The setting as a word of the command line."""
    return f"train.only=[{','.join(names)}]"


def initial_state(settings: dict) -> dict[str, torch.Tensor]:
    """The model before its first step."""
    config = config_of(settings, FLOAT64)
    model = Trinity(config.model).double()
    model.init_weights(config.run.seed)
    return model.state_dict()


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Equal to SCALE."""
    bound = SCALE * expected.abs().amax().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound, msg=name)


def test_every_parameter_alone(settings: dict, full: dict[str, Any]) -> None:
    """Each parameter of a dense and of a sparse block, trained alone, has its gradient of the full run."""
    kept = ("embed", "blocks.0.ffn.", "blocks.2.", "norm", "head")
    names = [name for name in full["gradients"][0] if name.startswith(kept)]
    assert len(names) > 15
    for name in names:
        recorded = run_steps_alone(settings, [*FLOAT64, only([name])], 1)
        assert recorded["gradients"][0].keys() == {name}
        assert_equal(recorded["gradients"][0][name], full["gradients"][0][name], name)
        assert recorded["metrics"][0]["loss"] == pytest.approx(full["metrics"][0]["loss"], rel=1e-14)


@pytest.mark.parametrize("names", [MIXED, LATE], ids=["mixed", "late"])
@pytest.mark.parametrize("words", [[], ["recompute=block", "batch.microbatch=4", "parallel.defer_reduce=on"]])
def test_the_rest_stays(settings: dict, full: dict[str, Any], names: list[str], words: list[str]) -> None:
    """Three steps: the frozen parameters and biases bit for bit, no state of them; the first gradients as in full."""
    recorded = run_steps_alone(settings, [*FLOAT64, *words, only(names)], 3)
    before = initial_state(settings)
    trained = trained_parameters(list(full["gradients"][0]), names)
    for gradients in recorded["gradients"]:
        assert gradients.keys() == trained
    for name in trained:
        assert_equal(recorded["gradients"][0][name], full["gradients"][0][name], name)
        assert not torch.equal(recorded["state"][name], before[name]), name
    moving = {
        f"blocks.2.ffn.{buffer}" for buffer in ("expert_bias", "expert_momentum") if "blocks.2.ffn.router" in names
    }
    for name in before.keys() - trained - moving:
        assert torch.equal(recorded["state"][name], before[name]), name
    for name in moving:
        assert recorded["state"][name].abs().sum() > 0, name
    of_optimizers = recorded["state"].keys() - before.keys()
    assert {key.split(".", 2)[2] for key in of_optimizers} == trained


@pytest.fixture(scope="module")
def alone(settings: dict) -> Callable[[tuple[str, ...]], dict[str, Any]]:
    """alone(names): three steps of one process in one microbatch, computed once for each."""
    return cache(lambda names: run_steps_alone(settings, [*FLOAT64, only(list(names)), "batch.microbatch=12"], 3))


def meshes() -> Iterator[Any]:
    """Every mesh, reduced once a step and after each microbatch; three of the six in every test run."""
    for name, defer in itertools.product(MESHES, ("on", "off")):
        often = name == "shard 4, expert 2" or (name.startswith("shard 2, context") and defer == "on")
        yield pytest.param(name, defer, marks=() if often else pytest.mark.slow)


@pytest.mark.parametrize(("name", "defer"), meshes())
def test_equals_one_process(settings: dict, processes: Callable, alone: Callable, name: str, defer: str) -> None:
    """Three steps in three microbatches: data, loss, gradients, norm, weights, biases and optimizer state."""
    world, words = MESHES[name]
    words = [*FLOAT64, only(MIXED), *words, "batch.microbatch=1", f"parallel.defer_reduce={defer}"]
    runs = processes(world).run(run_steps, settings, words, 3)
    assert_same(runs, alone(tuple(MIXED)))


@pytest.mark.slow
def test_late_modules_on_a_mesh(settings: dict, processes: Callable, alone: Callable) -> None:
    """Blocks without a backward pass, with recompute."""
    world, words = MESHES["shard 4, expert 2"]
    words = [*FLOAT64, only(LATE), *words, "batch.microbatch=1", "recompute=block"]
    runs = processes(world).run(run_steps, settings, words, 3)
    assert_same(runs, alone(tuple(LATE)))
