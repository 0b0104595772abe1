"""Rank 0 of N, built by the code that runs, without memory and without the others: on meta, over a fake process group.

What a rank holds and says to others is read off the sharded model itself, so that a plan cannot drift from what runs.
Rank 0 holds the most: where rows do not divide, the first ranks have whole chunks.
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
from trinity.parallel.fsdp import sharded_modules
from trinity.parallel.mesh import Ranks, Sizes, join_meshes
from trinity.training.build import build_model, make_optimizers


class Group(NamedTuple):
    """Parameters that FSDP gathers and reduces together.

    part: what they belong to: "embed", "blocks.3", "norm" or "head".
    kind: "experts", "precise" (norms and router) or "dense".
    shards: ranks that it is spread over. gathered: bytes of it when whole, in the dtype in which it is used.
    reduced: bytes of its whole gradient, in the dtype in which gradients travel. Padding to equal shards is included.
    gathers: how often a microbatch: for its forward pass, and for its backward pass where it is freed between them.
    """

    part: str
    kind: str
    shards: int
    gathered: int
    reduced: int
    gathers: int


class Sharded(NamedTuple):
    """A run on rank 0: its mesh, its sharded model and optimizers on meta, and the model's FSDP groups in order."""

    ranks: Ranks
    model: Trinity
    optimizers: Optimizers
    groups: list[Group]


@contextmanager
def sharded(config: RunConfig, sizes: Sizes) -> Iterator[Sharded]:
    """Build rank 0 of a run; it can be used inside the block, which holds the process's default group.

    Raises:
        AssertionError: this process is in a process group already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a plan needs a process that has not joined a run"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=sizes.replicate * sizes.shard)
    try:
        ranks = replace(join_meshes(sizes, torch.device("cpu")), device=torch.device("meta"))
        # neither changes what is held or sharded
        model = build_model(replace(config, recompute="none", compile="none"), ranks)
        optimizers = make_optimizers(config, model)
        optimizers.init_state()
        yield Sharded(ranks, model, optimizers, fsdp_groups(model))
    finally:
        dist.destroy_process_group()


def fsdp_groups(model: nn.Module) -> list[Group]:
    """The groups that FSDP2 made of a sharded model's parameters, in the order in which the forward pass uses them."""
    roles = {id(role.parameter): role for role in parameter_roles(model)}
    # no public way says which parameters are gathered together; modules of one group share its object
    found = [module._get_fsdp_state()._fsdp_param_group for module in sharded_modules(model)]
    return [_group(group, roles) for group in dict.fromkeys(found) if group is not None and group.fsdp_params]


def _group(group: Any, roles: dict[int, Role]) -> Group:
    owned = [roles[id(parameter.sharded_param)] for parameter in group.fsdp_params]
    kinds = {role.kind for role in owned}
    kind = "experts" if "experts" in kinds else "precise" if kinds <= {"gain", "router"} else "dense"
    name = owned[0].name.split(".")
    shards, kept = group.mesh_info.shard_mesh_size, owned[0].parameter.dtype
    numel = shards * sum(parameter.padded_sharded_param_size.numel() for parameter in group.fsdp_params)
    return Group(
        ".".join(name[:2]) if name[0] == "blocks" else name[0],
        kind,
        shards,
        gathered=numel * (group.mp_policy.param_dtype or kept).itemsize,
        reduced=numel * (group.mp_policy.reduce_dtype or kept).itemsize,
        gathers=1 if group.post_forward_mesh_info is None else 2,
    )


def state_bytes(model: nn.Module, optimizers: Optimizers) -> dict[str, int]:
    """Bytes that this rank holds from the first step to the last, whatever the batch.

    Gradients are there from the first backward pass to the optimizer's step; they take what parameters do, and where
    rows do not divide, padding to equal shards besides.

    Returns:
        "parameters", "gradients", "Muon momentum" (and the counts of starved steps), "AdamW moments" and
        "expert biases" (with their momentum).
    """
    muon, adamw = (_state(optimizer) for optimizer in (optimizers.muon, optimizers.adamw))
    return {
        "parameters": sum(map(local_bytes, model.parameters())),
        "gradients": sum(map(local_bytes, model.parameters())),
        "Muon momentum": muon,
        "AdamW moments": adamw,
        "expert biases": sum(map(local_bytes, model.buffers())),
    }


def local_bytes(x: Tensor) -> int:
    """Bytes of a tensor on this rank."""
    part = x.detach()
    part = part.to_local() if isinstance(part, DTensor) else part
    return part.numel() * part.element_size()


def _state(optimizer: torch.optim.Optimizer) -> int:
    return sum(local_bytes(x) for state in optimizer.state.values() for x in state.values())
