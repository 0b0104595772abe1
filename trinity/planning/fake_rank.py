"""Rank 0 of N, built by the training code itself on the meta device over a fake process group of N ranks.

Shards, FSDP groups and optimizer state are read from the sharded model, so a plan cannot differ from the run. Rank 0
holds the most: where rows do not divide, the first ranks have whole chunks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trinity.config.run import RunConfig
from trinity.models.param_roles import Role, parameter_roles
from trinity.models.trinity import Trinity
from trinity.optim.build import Optimizers
from trinity.parallel.fsdp import param_groups
from trinity.parallel.mesh import Ranks, Sizes, join_meshes
from trinity.parallel.one_rank_groups import computes_in_place, is_local
from trinity.training.build import build_model, make_optimizers


class FsdpGroup(NamedTuple):
    """Parameters that FSDP gathers and reduces together.

    part: "embed", "blocks.3", "norm" or "head".
    kind: "experts", "precise" (norms and router) or "dense".
    shards: number of shards.
    gathered: bytes of the unsharded parameters in the compute dtype; 0 if modules compute with the shards' memory.
    reduced: bytes of the unsharded gradient of the trained ones in the reduce dtype. Both include FSDP's padding to
        equal shards.
    gathers: all-gathers in a microbatch: one for the forward pass, one for backward if the parameters are freed.
    local: whether it is on one rank, and its gradients are not reduced.
    frozen: number of unsharded parameters that are not trained (train.only).
    """

    part: str
    kind: str
    shards: int
    gathered: int
    reduced: int
    gathers: int
    local: bool = False
    frozen: int = 0


class FakeRank(NamedTuple):
    """Rank 0 of a run: mesh, sharded model and optimizers on meta, and the FSDP groups in forward order."""

    ranks: Ranks
    model: Trinity
    optimizers: Optimizers
    groups: list[FsdpGroup]


@contextmanager
def fake_rank(config: RunConfig, sizes: Sizes) -> Iterator[FakeRank]:
    """Context manager: rank 0 of a run, while the process's default group is a fake one.

    Raises:
        AssertionError: this process is in a process group already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a plan needs a process that has not joined a run"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=sizes.replicate * sizes.shard)
    try:
        ranks = replace(join_meshes(sizes, torch.device("cpu")), device=torch.device("meta"))
        # neither changes what a rank holds or how it is sharded
        model = build_model(replace(config, recompute="none", compile="none"), ranks)
        optimizers = make_optimizers(config, model)
        optimizers.init_state()
        yield FakeRank(ranks, model, optimizers, fsdp_groups(model))
    finally:
        dist.destroy_process_group()


def fsdp_groups(model: nn.Module) -> list[FsdpGroup]:
    """The FSDP2 groups of a sharded model's parameters, in forward order."""
    roles = {id(role.parameter): role for role in parameter_roles(model)}
    return [_describe(group, roles) for group in param_groups(model)]


def _describe(group: Any, roles: dict[int, Role]) -> FsdpGroup:
    members = [roles[id(parameter.sharded_param)] for parameter in group.fsdp_params]
    kinds = {role.kind for role in members}
    kind = "experts" if "experts" in kinds else "precise" if kinds <= {"gain", "router"} else "dense"
    name = members[0].name.split(".")
    shards, master_dtype = group.mesh_info.shard_mesh_size, members[0].parameter.dtype
    sizes = [(parameter.padded_sharded_param_size.numel(), parameter) for parameter in group.fsdp_params]
    numel = shards * sum(size for size, _ in sizes)
    trained = shards * sum(size for size, parameter in sizes if parameter.sharded_param.requires_grad)
    return FsdpGroup(
        ".".join(name[:2]) if name[0] == "blocks" else name[0],
        kind,
        shards,
        gathered=0 if computes_in_place(group) else numel * (group.mp_policy.param_dtype or master_dtype).itemsize,
        reduced=trained * (group.mp_policy.reduce_dtype or master_dtype).itemsize,
        gathers=1 if group.post_forward_mesh_info is None else 2,
        local=is_local(group),
        frozen=numel - trained,
    )


def state_bytes(model: nn.Module, optimizers: Optimizers) -> dict[str, int]:
    """Bytes of this rank's training state; they do not depend on the batch.

    Gradients exist from the first backward pass to the optimizer's step. They take as many bytes as the parameters that
    are trained, plus padding to equal shards where rows do not divide.

    Returns:
        "parameters", "gradients", "Muon momentum" (with the counts of starved steps), "AdamW moments" and
        "expert biases" (with their momentum).
    """
    muon, adamw = (_optimizer_state_bytes(optimizer) for optimizer in (optimizers.muon, optimizers.adamw))
    return {
        "parameters": sum(map(local_bytes, model.parameters())),
        "gradients": sum(local_bytes(parameter) for parameter in model.parameters() if parameter.requires_grad),
        "Muon momentum": muon,
        "AdamW moments": adamw,
        "expert biases": sum(map(local_bytes, model.buffers())),
    }


def local_bytes(x: Tensor) -> int:
    """Bytes of a tensor on this rank."""
    shard = x.detach()
    shard = shard.to_local() if isinstance(shard, DTensor) else shard
    return shard.numel() * shard.element_size()


def _optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(local_bytes(x) for state in optimizer.state.values() for x in state.values())
