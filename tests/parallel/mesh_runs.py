"""Run some training steps on any mesh and record everything that must not depend on the mesh.

Shapes: R rows of a global batch, S sequence, M MoE layers, K active experts.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import trinity_kernels
from trinity.config.load import OmegaConf, build_config
from trinity.config.run import RunConfig
from trinity.data.stream.collate import Batch
from trinity.models.moe import MoE
from trinity.optim import Muon, orthogonalize, rate_factor
from trinity.optim.muon_layout import MatrixBatch
from trinity.parallel import mesh
from trinity.training import train_step as step_module
from trinity.training.build import build_model, make_optimizers
from trinity.training.build_data import open_stream
from trinity.training.train_step import train_step

BOUND = 1e-10


def config_of(settings: dict, words: list[str]) -> RunConfig:
    """A config from settings and dotted words, without data workers: the pool's processes are daemons."""
    words = ["data.workers=0", *words]
    return build_config([("test", OmegaConf.create(settings)), ("test", OmegaConf.from_dotlist(words))])


def run_steps(
    settings: dict, words: list[str], steps: int, wrong: str | None = None, routes: list[Tensor] | None = None
) -> dict[str, Any]:
    """Run the first steps of a config; every rank calls it.

    Args:
        wrong: name of a mistake to make, from MISTAKES.
        routes: [M, R, S, K] for each step, in place of the router's choice.
    Returns:
        "tokens" and "routes" of this rank's part of its rows for each step, and "context", the ranks that have parts of
        the same rows; and, gathered, on every rank: "gradients" (before clipping), "counts" and "metrics" for each
        step, and the final "state".
    """
    config = config_of(settings, words)
    ranks = mesh.start(config.parallel, config.model, 1, False)
    model = build_model(config, ranks)
    model.init_weights(config.run.seed)
    optimizers = make_optimizers(config, model)
    stream = open_stream(config, ranks.data_rank, ranks.data_ranks)
    recorded: dict[str, list] = {key: [] for key in ("tokens", "routes", "gradients", "counts", "metrics")}
    with ExitStack() as stack:
        if wrong:
            stack.enter_context(MISTAKES[wrong][0](model))
        for step in range(steps):
            batch = uneven_batch(stream.take(config.batch.sequences // ranks.data_ranks), ranks.data_rank == 0)
            columns = ranks.columns(batch.tokens_BS.shape[1])
            forced = None if routes is None else routes[step][:, ranks.data_rank :: ranks.data_ranks, columns]
            with record_step(model, recorded, len(batch.tokens_BS), forced):
                result = train_step(model, optimizers, batch, config, 1.0, ranks)
            assert result.skip_reason is None
            recorded["tokens"].append(batch.tokens_BS[:, columns])
            recorded["metrics"].append(result.metrics)
    state = {name: full_copy(tensor) for name, tensor in model.state_dict().items()}
    state |= {name: full_copy(tensor) for name, tensor in optimizers.state_dict().items()}
    return recorded | {"state": state, "context": ranks.sizes.context}


def run_steps_alone(settings: dict, words: list[str], steps: int, routes: list[Tensor] | None = None) -> dict[str, Any]:
    """run_steps in this process alone."""
    try:
        return run_steps(settings, words, steps, None, routes)
    finally:
        mesh.stop()


def uneven_batch(batch: Batch, first: bool) -> Batch:
    """A batch whose first row has fewer targets if `first`: ranks then have different numbers of valid targets."""
    if first:
        batch.targets_BS[0, :11] = -100
    return batch


@contextmanager
def record_step(
    model: torch.nn.Module, recorded: dict[str, list], rows: int, forced: Tensor | None = None
) -> Iterator[None]:
    """Record raw gradients, counts and routes of one step; forced: this rank's routes [M, rows, S, K], or None."""
    routes: list[Tensor] = []
    clip, route, counts_of = step_module.clip_, trinity_kernels.route, step_module.total_counts

    def record_gradients(gradients: list[Tensor], norm: Tensor, most: float) -> None:
        named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        recorded["gradients"].append({name: full_copy(grad) for name, grad in named.items()})
        clip(gradients, norm, most)

    def record_route(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        indices, counts = route(*args, **kwargs)
        if forced is not None:
            part, layer = divmod(len(routes), len(forced))
            size = len(indices) // forced.shape[2]
            indices = forced[layer, part * size : (part + 1) * size].flatten(0, 1)
            counts = torch.bincount(indices.flatten(), minlength=len(counts))
        if torch._C._current_graph_task_id() == -1:  # not while backward recomputes a block
            routes.append(indices.clone())
        return indices, counts

    def record_counts(parts: list) -> Tensor:
        counts = counts_of(parts)
        recorded["counts"].append(counts.clone())
        return counts

    with (
        mock.patch.object(step_module, "clip_", record_gradients),
        mock.patch.object(trinity_kernels, "route", record_route),
        mock.patch.object(step_module, "total_counts", record_counts),
    ):
        yield
    layers = sum(isinstance(module, MoE) for module in model.modules())
    parts = [torch.stack(routes[at : at + layers]) for at in range(0, len(routes), layers)]
    by_row = [part.unflatten(1, (rows // len(parts), -1)) for part in parts]
    recorded["routes"].append(torch.cat(by_row, dim=1).sort(dim=-1).values)  # [M, rows, S, K]


def full_copy(tensor: Tensor) -> Tensor:
    """A copy of the full tensor."""
    return tensor.detach().full_tensor().clone() if isinstance(tensor, DTensor) else tensor.detach().clone()


def in_batch_order(per_rank: list[dict[str, Any]], key: str, dim: int) -> list[Tensor]:
    """The records of all ranks' rows in the order of the global batch, for each step; dim is that of the rows."""
    context = per_rank[0]["context"]
    steps = []
    for parts in zip(*(run[key] for run in per_rank)):
        rows = [torch.cat(parts[at : at + context], dim=dim + 1) for at in range(0, len(parts), context)]
        steps.append(torch.stack(rows, dim=dim + 1).flatten(dim, dim + 1))
    return steps


def assert_same(
    per_rank: list[dict[str, Any]], expected: dict[str, Any], bound: float = BOUND, state: bool = True
) -> None:
    """Assert that every rank's records equal those of one process: data, counts and routes exactly, floats to a bound.

    Args:
        state: whether to compare the final weights, biases and optimizer state too.
    """
    for key, dim in (("tokens", 0), ("routes", 1)):
        for actual, reference in zip(in_batch_order(per_rank, key, dim), expected[key], strict=True):
            assert torch.equal(actual, reference), key
    for run in per_rank:
        for actual, reference in zip(run["counts"], expected["counts"], strict=True):
            assert torch.equal(actual, reference), "counts"
        for step, (actual, reference) in enumerate(zip(run["gradients"], expected["gradients"], strict=True)):
            assert_tensors(actual, reference, bound, f"raw gradient of step {step}")
        for step, (actual, reference) in enumerate(zip(run["metrics"], expected["metrics"], strict=True)):
            assert actual.keys() == reference.keys()
            for name, value in reference.items():
                assert abs(actual[name] - value) <= bound * max(1, abs(value)), f"metric {name} of step {step}"
        if state:
            assert_tensors(run["state"], expected["state"], bound, "state")


def assert_tensors(actual: dict[str, Tensor], reference: dict[str, Tensor], bound: float, what: str) -> None:
    """Assert equal names, and values to the bound times max(1, largest value of the tensor)."""
    assert actual.keys() == reference.keys(), what
    for name, tensor in reference.items():
        assert actual[name].dtype == tensor.dtype, f"{what}: {name}"
        far = (actual[name].double() - tensor.double()).abs().max().item() if tensor.numel() else 0.0
        assert far <= bound * max(1.0, tensor.abs().max().item()), f"{what}: {name} is {far:.1e} away"


@contextmanager
def _scaled_expert_gradients(model: torch.nn.Module) -> Iterator[None]:
    """Multiply expert gradients by the expert degree, to which neither Muon nor SMEBU reacts."""
    for block in model.blocks:
        if block.sparse:
            block.ffn.experts.set_gradient_divide_factor(0.5)
    yield


@contextmanager
def _counts_not_reduced(_model: torch.nn.Module) -> Iterator[None]:
    """Balance by each rank's own counts."""
    own = lambda parts: torch.stack([part.counts_ME for part in parts]).sum(dim=0)  # noqa: E731
    with mock.patch.object(step_module, "total_counts", own):
        yield


@contextmanager
def _norm_twice(model: torch.nn.Module) -> Iterator[None]:
    """Count experts' gradients twice in the norm."""
    norm = step_module.global_norm

    def doubled(gradients: list[Tensor], group: dist.ProcessGroup) -> Tensor:
        return norm([*gradients, *(p.grad for name, p in model.named_parameters() if ".experts." in name)], group)

    with mock.patch.object(step_module, "global_norm", doubled):
        yield


@contextmanager
def _valid_not_reduced(_model: torch.nn.Module) -> Iterator[None]:
    """Divide each rank's loss by its own valid targets (times the ranks)."""
    with mock.patch.object(step_module, "_all_reduce_count", lambda count: int(count) * dist.get_world_size()):
        yield


@contextmanager
def _shards_orthogonalized(_model: torch.nn.Module) -> Iterator[None]:
    """Apply Newton-Schulz to each rank's rows as if they were the whole matrix."""

    def on_shards(optimizer: Muon, batch: MatrixBatch, _factors: Any, rate: float) -> Iterator[None]:
        for stack in batch.stacks:
            u = stack.view(optimizer.state[stack.role.parameter]["momentum"]) * optimizer.momentum
            u += stack.view(stack.role.parameter.grad)
            if not u.numel():
                continue
            update = orthogonalize(u, optimizer.coefficients, optimizer.steps, optimizer.dtype)
            stack.view(stack.role.parameter.detach()).add_(update, alpha=-rate * rate_factor(*batch.shape))
        yield

    with mock.patch.object(Muon, "_update_batch", on_shards):
        yield


# name of the mistake → how to make it, and the comparison that must fail
MISTAKES: dict[str, tuple[Callable[[torch.nn.Module], Any], str]] = {
    "expert gradients scaled by the expert degree": (_scaled_expert_gradients, r"raw gradient.*experts"),
    "counts not reduced": (_counts_not_reduced, "counts"),
    "an expert's norm counted twice": (_norm_twice, "metric grad_norm"),
    "valid targets not reduced": (_valid_not_reduced, "raw gradient"),
    "shards orthogonalized": (_shards_orthogonalized, r"state: blocks.*(qkvg|gate_up|down|out)"),
}
