"""A run on any mesh equals one process: data, routes, counts, raw gradients, norm, weights, biases and state.

In float64 to 1e-10: rounding is 1e-16, Newton-Schulz amplifies it by about 500 per step, over five steps or three.
In fp32 the same amplification of 1e-7 gives FP32_BOUND (measured). In bf16 routes would flip, so one step with forced
routes is compared.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.parallel.mesh_runs import (
    MISTAKES,
    assert_same,
    config_of,
    full_copy,
    run_steps,
    run_steps_alone,
    uneven_batch,
)
from trinity.models import Trinity
from trinity.parallel import fsdp, mesh
from trinity.parallel.comm_counter import count_collectives
from trinity.training.build import build_model, make_optimizers
from trinity.training.build_data import open_stream
from trinity.training.train_step import train_step

STEPS = 3
MORE_STEPS = 5  # in the slow tests
FLOAT64 = ["precision.compute=float64", "optim.muon.dtype=float64"]
FP32_BOUND = 1e-5  # of the largest value of a tensor; 1e-6 measured over these meshes
# A gradient that cancels to 1e-7 from terms of 0.1 is only rounding, and AdamW at its usual ε makes a full step of it.
WIDE_EPSILON = ["optim.adamw.eps=1e-4"]
BF16_BOUND = 1e-2  # 3e-3 measured: a rank's gradients are rounded to 8 bits before they are added in fp32
# clipping at 0.5 applies in every step; a batch of 12 is 6 rows for each of 2 ranks, 3 for each of 4
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
    """expected(words, steps): the records of one process, computed once for each."""
    records: dict[tuple, dict[str, Any]] = {}

    def once(words: list[str], steps: int) -> dict[str, Any]:
        model = [word for word in words if not word.startswith(("parallel.", "recompute=", "batch.microbatch="))]
        key = (*model, steps)
        if key not in records:
            records[key] = run_steps_alone(settings, [*model, "batch.microbatch=12"], steps)
        return records[key]

    return once


# Every test run compares each mesh once, and these also in fp32 and bf16; the rest is in `make test-slow`.
OFTEN = ("shard 2, expert 2", "shard 4, expert 2", "replicate 2 × shard 2, expert 2")


def grid() -> Iterator[Any]:
    """Every mesh, with and without recompute, in one microbatch and in three; one of the four in every test run."""
    for name, recompute, microbatches in itertools.product(MESHES, ("none", "block"), (1, 3)):
        if (recompute, microbatches) == (("block", 3) if name in OFTEN else ("none", 1)):
            yield pytest.param(name, recompute, microbatches, STEPS)
        else:
            yield pytest.param(name, recompute, microbatches, MORE_STEPS, marks=pytest.mark.slow)


def often_and_slow() -> Iterator[Any]:
    """Every mesh; those of OFTEN in every test run."""
    for name in MESHES:
        yield pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow)


@pytest.mark.parametrize(("name", "recompute", "microbatches", "steps"), grid())
def test_equals_one_process(
    settings: dict, processes: Callable, expected: Callable, name: str, recompute: str, microbatches: int, steps: int
) -> None:
    """The grid. Gradients of several microbatches are reduced after each, or (with recompute) once per step."""
    world, words = MESHES[name]
    defer = "on" if recompute == "block" else "off"
    words = [*FLOAT64, *BATCH, *words, f"batch.microbatch={12 // world // microbatches}"]
    words += [f"recompute={recompute}", f"parallel.defer_reduce={defer}"]
    runs = processes(world).run(run_steps, settings, words, steps)
    assert_same(runs, expected(words, steps))


@pytest.mark.parametrize("name", often_and_slow())
def test_in_fp32(settings: dict, processes: Callable, expected: Callable, name: str) -> None:
    """Two steps of the recipe as it runs on a CPU."""
    world, words = MESHES[name]
    words = [*BATCH, *WIDE_EPSILON, *words, f"batch.microbatch={12 // world}"]
    runs = processes(world).run(run_steps, settings, words, 2)
    assert_same(runs, expected(words, 2), FP32_BOUND)


@pytest.mark.parametrize("name", often_and_slow())
def test_one_step_in_bf16(settings: dict, processes: Callable, expected: Callable, name: str) -> None:
    """As on a GPU: bf16 compute with fp32 masters, routes forced to those of one process in float64.

    Compares raw gradients, counts and metrics; a single step is too small to show in the weights.
    """
    world, words = MESHES[name]
    model = [word for word in words if word.startswith("model.")]
    routes = expected([*FLOAT64, *BATCH, *model], STEPS)["routes"]
    words = [*BATCH, "precision.compute=bfloat16", *words]
    one = run_steps_alone(settings, [*BATCH, "precision.compute=bfloat16", *model, "batch.microbatch=12"], 1, routes)
    runs = processes(world).run(run_steps, settings, [*words, f"batch.microbatch={12 // world}"], 1, None, routes)
    assert_same(runs, one, BF16_BOUND, state=False)


@pytest.mark.parametrize("wrong", MISTAKES)
def test_mistakes_are_caught(settings: dict, processes: Callable, expected: Callable, wrong: str) -> None:
    """The comparison of the grid fails for each mistake, in one step."""
    world, words = MESHES["shard 4, expert 2"]
    words = [*FLOAT64, *BATCH, *words, "batch.microbatch=3"]
    with pytest.raises(AssertionError, match=MISTAKES[wrong][1]):
        assert_same(processes(world).run(run_steps, settings, words, 1, wrong), expected(words, 1))


def initial_weights(settings: dict, words: list[str]) -> dict[str, torch.Tensor]:
    """The gathered initial weights of a run on this mesh."""
    config = config_of(settings, words)
    ranks = mesh.start(config.parallel, config.model, 1, False)
    model = build_model(config, ranks)
    model.init_weights(config.run.seed)
    return {name: full_copy(tensor) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", MESHES)
def test_initial_weights(settings: dict, processes: Callable, name: str) -> None:
    """Bit for bit those of an unsharded model, although each rank makes only its shards."""
    world, words = MESHES[name]
    config = config_of(settings, words)
    model = Trinity(config.model)
    model.init_weights(config.run.seed)
    for weights in processes(world).run(initial_weights, settings, ["precision.compute=float32", *words]):
        assert weights.keys() == model.state_dict().keys()
        for key, tensor in model.state_dict().items():
            assert torch.equal(weights[key], tensor), key


def one_policy(block: Any, _precise: Callable, compute: Callable, experts: Callable) -> None:
    """A wrong fsdp._shard_block: norms and router get the policy of the rest of the block."""
    shard_block(block, compute, compute, experts)


shard_block = fsdp._shard_block


def dtypes_inside(settings: dict, words: list[str], wrong: bool) -> dict[str, str]:
    """The dtype of each parameter and buffer while its module computes, in bf16."""
    config = config_of(settings, [*BATCH, *words, "precision.compute=bfloat16"])
    ranks = mesh.start(config.parallel, config.model, 1, False)
    one_group = mock.patch.object(fsdp, "_shard_block", one_policy)
    with one_group if wrong else nullcontext():
        model = build_model(config, ranks)
    model.init_weights(0)
    dtypes: dict[str, str] = {}

    def note(module: torch.nn.Module, _inputs: object, name: str) -> None:
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        dtypes.update({f"{name}.{key}": str(tensor.dtype) for key, tensor in tensors})

    for name, module in model.named_modules():
        module.register_forward_pre_hook(partial(note, name=name))  # runs after FSDP's hook, which gathers
    batch = uneven_batch(open_stream(config, ranks.rank, ranks.data_ranks).take(2), False)
    model(batch.tokens_BS, targets_BS=batch.targets_BS)
    return dtypes


@pytest.mark.parametrize("wrong", [False, True])
def test_precision_by_part(settings: dict, processes: Callable, wrong: bool) -> None:
    """In a bf16 block gains, router and balancing state are fp32, matrices bf16; one policy for a block is caught."""
    world, words = MESHES["shard 2, expert 2"]
    for dtypes in processes(world).run(dtypes_inside, settings, words, wrong):
        precise = {name: dtype for name, dtype in dtypes.items() if "gain" in name or "router" in name}
        state = {name: dtype for name, dtype in dtypes.items() if "expert_" in name}
        rest = {name: dtype for name, dtype in dtypes.items() if name not in precise | state}
        assert any("q_norm" in name for name in precise)
        assert any("experts.gate_up" in name for name in rest)
        assert set(state.values()) == {"torch.float32"}
        assert set(rest.values()) == {"torch.bfloat16"}
        assert (set(precise.values()) == {"torch.float32"}) != wrong


def collectives_of_a_step(settings: dict, words: list[str]) -> tuple[dict, dict[str, int]]:
    """Calls and bytes of the second step's collectives, by kind and size of group; bytes of the gathered parameters."""
    config = config_of(settings, words)
    ranks = mesh.start(config.parallel, config.model, 1, False)
    model = build_model(config, ranks)
    model.init_weights(0)
    optimizers = make_optimizers(config, model)
    batch = uneven_batch(open_stream(config, ranks.rank, ranks.data_ranks).take(3), False)
    train_step(model, optimizers, batch, config, 1.0, ranks)
    with count_collectives() as traffic:
        train_step(model, optimizers, batch, config, 1.0, ranks)
    gathered = {name: 4 * p.numel() for name, p in model.named_parameters()}
    return {key: tuple(value) for key, value in traffic.items()}, gathered


def test_collectives_of_a_step(settings: dict, processes: Callable) -> None:
    """Calls and bytes of every kind for one mesh: unnecessary communication fails here.

    Three blocks, two of them sparse. Every matrix's rows divide by 4 ranks, so no gather is padded.
    """
    words = [*BATCH, "parallel.shard=4", "parallel.expert=2", "batch.microbatch=3"]
    runs = processes(4).run(collectives_of_a_step, settings, words)
    exchanged = 0
    for traffic, sizes in runs:
        experts = sum(size for name, size in sizes.items() if ".experts." in name) // 2  # a rank gathers its half
        dense = sum(size for name, size in sizes.items() if ".experts." not in name)
        ending = sizes["norm.gain"] + sizes["head.weight"]
        # of 4 ranks, in float64: CE and valid targets of 3 rows, four more, and the entropy of 2 layers
        metrics_bytes = 4 * 8 * (3 + 3 + 4 + 2)
        assert traffic.keys() == {
            (kind, 4) for kind in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
        } | {(kind, 2) for kind in ("all_gather", "reduce_scatter", "all_to_all")}
        # over the 4 ranks of shard: 9 groups (two per block, embedding, norm, head) in forward, 7 in backward
        assert traffic["all_gather", 4] == (9 + 7 + 1, 2 * dense - ending + metrics_bytes)
        assert traffic["reduce_scatter", 4] == (9, dense)
        # valid targets; counts of 2 layers × 8 experts; the squared norm
        assert traffic["all_reduce", 4] == (3, 8 + 2 * 8 * 8 + 8)
        # over the 2 ranks of expert_shard
        assert traffic["all_gather", 2] == (2 + 2, 2 * experts)
        assert traffic["reduce_scatter", 2] == (2, experts)
        # over the 2 ranks of expert, per layer: counts, tokens, choices, sums; in backward sums, tokens, choices
        assert traffic["all_to_all", 2][0] == 2 * (4 + 3)
        # Muon: to the owners and back for six shapes: q gate out, k v, dense gate up, dense down, router, shared
        calls, size = traffic["all_to_all", 4]
        assert calls % 2 == 0
        exchanged += size
        muons = sum(size for name, size in sizes.items() if "norm" not in name and name.startswith("blocks"))
    assert exchanged == 2 * (muons - 2 * experts)
