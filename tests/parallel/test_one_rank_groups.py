"""Groups on one rank: the same bits as with FSDP's own copies, without the copies.

The reference is the same run with FSDP's path: weights copied and freed every microbatch, gradients reduced by FSDP.
Both add the same numbers in the same order, so gradients, weights and optimizer state are compared bit for bit.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.parallel.mesh_runs import config_of, full_copy, uneven_batch
from trinity.checkpoint.load import model_state
from trinity.config.run import RunConfig
from trinity.interop import export_hf
from trinity.models import Trinity
from trinity.models.param_roles import parameter_roles
from trinity.monitor.hooks import NO_HOOKS, StepHooks
from trinity.parallel import grad_accumulation, mesh, one_rank_groups
from trinity.parallel.fsdp import param_groups
from trinity.training.build import build_model, make_optimizers
from trinity.training.build_data import open_stream
from trinity.training.train_step import _forward_and_backward, train_step

STEPS = 2  # 3 if the second is skipped
BATCH = ["batch.sequences=12", "batch.ramp=[]", "batch.microbatch=4"]
MESHES: dict[str, tuple[int, list[str]]] = {
    "shard 2": (2, ["parallel.shard=2"]),
    "replicate 2": (2, ["parallel.replicate=2"]),
    "shard 2, expert 2": (2, ["parallel.shard=2", "parallel.expert=2"]),
}


@contextmanager
def copies_of_fsdp() -> Iterator[None]:
    """No group counts as one that needs no communication."""
    with ExitStack() as stack:
        for module in (one_rank_groups, grad_accumulation):
            stack.enter_context(mock.patch.object(module, "is_local", return_value=False))
            stack.enter_context(mock.patch.object(module, "is_whole", return_value=False))
        yield


def run(
    settings: dict, words: list[str], fsdp: bool, between: str = "nothing", folder: str | None = None
) -> dict[str, Any]:
    """Some steps, with `between` after each: every step's gradients, and the final weights and optimizer state."""
    config = config_of(settings, [*BATCH, *words])
    ranks = mesh.start(config.parallel, config.model, 1, False)
    with copies_of_fsdp() if fsdp else nullcontext():
        model = build_model(config, ranks)
        model.init_weights(config.run.seed)
        optimizers = make_optimizers(config, model)
        stream = open_stream(config, ranks.rank, ranks.data_ranks)
        gradients: list[dict[str, Tensor]] = []
        update = optimizers.step

        def watched() -> None:
            gradients.append({name: full_copy(p.grad) for name, p in model.named_parameters()})
            update()

        optimizers.step = watched
        for step in range(STEPS + (between == "skipped step")):
            batch = uneven_batch(stream.take(12 // ranks.data_ranks), ranks.is_first)
            skips = between == "skipped step" and step == 1
            hooks = StepHooks(detect_spike=lambda *_: "spike", skip_spikes=True) if skips else NO_HOOKS
            assert (train_step(model, optimizers, batch, config, 1.0, ranks, hooks=hooks).skip_reason is None) != skips
            if between in ("validation", "saving", "export"):
                with torch.no_grad():
                    model(batch.tokens_BS, targets_BS=batch.targets_BS)
            if between == "saving":
                check_saved(model, optimizers)
            if between == "export":
                export_hf(model, f"{folder}/{step}")
    state = {name: full_copy(tensor) for name, tensor in model.state_dict().items()}
    state |= {name: full_copy(tensor) for name, tensor in optimizers.state_dict().items()}
    return {"gradients": gradients, "state": state}


def check_saved(model: Trinity, optimizers: Any) -> None:
    """A checkpoint's tensors are the shards that the optimizers change, although a forward pass gathered them."""
    saved = model_state(model)
    changed = {id(p) for group in optimizers.muon.param_groups + optimizers.adamw.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        assert id(parameter) in changed, name
        assert saved[f"model.{name}"].to_local().data_ptr() == parameter.to_local().data_ptr(), name


def alone(*arguments: Any) -> dict[str, Any]:
    """run() on a mesh of one, in this process."""
    try:
        return run(*arguments)
    finally:
        mesh.stop()


@pytest.fixture(scope="module")
def with_fsdp(recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """with_fsdp(words): run() alone with FSDP's own copies, once for all tests.

    Of what may happen between steps only a skipped step matters here: FSDP gathers the weights anew each time.
    """
    folder = tmp_path_factory.mktemp("with_fsdp")
    return cache(lambda *words, between="nothing": alone(recipe(folder / "run"), list(words), True, between))


def assert_same_bits(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same gradients in every step and the same final state."""
    assert len(actual["gradients"]) == len(expected["gradients"]) > 0
    pairs = [*zip(actual["gradients"], expected["gradients"]), (actual["state"], expected["state"])]
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("batch", [[], ["batch.microbatch=12"]], ids=["several microbatches", "one microbatch"])
def test_one_process(settings: dict, with_fsdp: Callable, compute: str, batch: list[str]) -> None:
    """Every compute dtype, with several microbatches and one."""
    words = [f"precision.compute={compute}", *batch]
    assert_same_bits(alone(settings, words, False), with_fsdp(*words))


@pytest.mark.parametrize("between", ["validation", "saving", "export", "skipped step", "recompute"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_the_next_step_uses_the_new_weights(
    settings: dict, with_fsdp: Callable, tmp_path: Path, compute: str, between: str
) -> None:
    """Whatever happened since the last step: a stale weight would give other gradients."""
    words = [f"precision.compute={compute}", *(["recompute=block"] if between == "recompute" else [])]
    ours = alone(settings, words, False, between, str(tmp_path))
    assert_same_bits(ours, with_fsdp(*words, between="skipped step" if between == "skipped step" else "nothing"))
    assert not torch.equal(ours["gradients"][0]["norm.gain"], ours["gradients"][-1]["norm.gain"])


@pytest.mark.parametrize(
    ("name", "compute"),
    [*((name, "float32") for name in MESHES), ("replicate 2", "bfloat16"), ("shard 2, expert 2", "bfloat16"),
     pytest.param("shard 2", "bfloat16", marks=pytest.mark.slow)],
)  # fmt: skip
def test_two_processes(settings: dict, processes: Callable, name: str, compute: str) -> None:
    """Beside groups on both ranks: experts that their rank has alone, and whole weights with a copy elsewhere."""
    world, words = MESHES[name]
    words = [*words, f"precision.compute={compute}", "parallel.defer_reduce=on"]
    pool = processes(world)
    runs = [pool.run(run, settings, words, fsdp, "validation") for fsdp in (False, True)]
    for ours, theirs in zip(*runs):
        assert_same_bits(ours, theirs)


class Written(TorchDispatchMode):
    """Elements written by operations that copy, cast, divide or join, by operation."""

    COPIES = ("copy_", "_to_copy", "_foreach_copy_", "chunk_cat", "_chunk_cat", "cat", "clone", "div", "add_")

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if name in self.COPIES:
            out = (kwargs or {}).get("out", args[0] if name.endswith("_") else result)
            tensors = out if isinstance(out, list | tuple) else [out]
            self.elements[name] += sum(tensor.numel() for tensor in tensors)
        return result


def written(config: RunConfig, whole: bool, fsdp: bool = False) -> tuple[Counter[str], int]:
    """Elements written in the second step's passes, in total; and the parameters of the model."""
    ranks = mesh.start(config.parallel, config.model, 1, False)
    with copies_of_fsdp() if fsdp else nullcontext():
        model = Trinity(config.model) if whole else build_model(config, ranks)
        model.init_weights(0)
        batch = open_stream(config, 0, 1).take(12)
        without_fsdp = mock.patch.multiple("trinity.training.train_step", **dict.fromkeys(FSDP_CALLS, mock.Mock()))
        with without_fsdp if whole else nullcontext():
            for _ in range(2):
                model.zero_grad()
                with Written() as counted:
                    _forward_and_backward(model, batch, 100, config, ranks, NO_HOOKS)
    numel = sum(parameter.numel() for parameter in model.parameters())
    mesh.stop()
    return +counted.elements, numel


FSDP_CALLS = ("defers_reduction", "set_reduction", "end_accumulation")


@pytest.mark.parametrize("microbatch", [4, 12])
def test_nothing_is_copied_in_fp32(settings: dict, microbatch: int) -> None:
    """One process writes no element more than a model without FSDP; FSDP itself writes some a parameter."""
    config = config_of(settings, [*BATCH, "precision.compute=float32", f"batch.microbatch={microbatch}"])
    bare, numel = written(config, whole=True)
    ours, _ = written(config, whole=False)
    assert ours == bare
    fsdp, _ = written(config, whole=False, fsdp=True)
    assert (fsdp - bare)["copy_"] >= numel


@pytest.mark.parametrize("defer", ["off", "auto"])
def test_nothing_is_divided_by_1(settings: dict, defer: str) -> None:
    """Also where FSDP reduces on one rank: as many elements are divided as without FSDP."""
    config = config_of(settings, [*BATCH, "precision.compute=float32", f"parallel.defer_reduce={defer}"])
    assert written(config, whole=False)[0]["div"] == written(config, whole=True)[0]["div"]


def test_weights_are_not_held_twice(settings: dict) -> None:
    """In fp32 a gathered weight has its shard's memory; in bf16 only norms and routers, which are fp32, do."""
    for compute in ("float32", "bfloat16"):
        config = config_of(settings, [*BATCH, f"precision.compute={compute}"])
        ranks = mesh.start(config.parallel, config.model, 1, False)
        model = build_model(config, ranks)
        model.init_weights(0)
        kinds = {id(role.parameter): role.kind for role in parameter_roles(model)}
        batch = open_stream(config, 0, 1).take(2)
        model(batch.tokens_BS, targets_BS=batch.targets_BS)
        for group in param_groups(model):
            for parameter in group.fsdp_params:
                kind = kinds[id(parameter.sharded_param)]
                shared = parameter._unsharded_param.data_ptr() == parameter.sharded_param.to_local().data_ptr()
                assert shared == (compute == "float32" or kind in ("gain", "router")), kind
        mesh.stop()
