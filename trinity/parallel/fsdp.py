"""FSDP2 for the model, with a mixed-precision policy per part of a block.

One bf16 policy for a whole block would silently convert router and gains to bf16. So each block has three
FSDP groups: norms and router in fp32, experts, and the rest, the last two in the compute dtype. FSDP never casts
inputs: each operation chooses its own precision.

Experts are sharded twice: split among neighbouring ranks (`expert`), each of which computes with its own, and each
share sharded over the ranks of `expert_shard`, which gather it for use. Everything else is sharded over `shard`.
Gradients are summed, never divided.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from trinity.config.run import PrecisionConfig
from trinity.models.layers import Norm
from trinity.models.moe import MoE, Router
from trinity.models.trinity import Block, Trinity
from trinity.parallel.expert_parallel import split_experts
from trinity.parallel.mesh import Ranks


def master_dtype(precision: PrecisionConfig) -> torch.dtype:
    """Dtype of parameters and optimizer state: fp32, or float64 for a run in float64."""
    return torch.float64 if precision.compute == "float64" else torch.float32


def shard_model(model: Trinity, ranks: Ranks, precision: PrecisionConfig, exchange: str = "auto") -> None:
    """Shard a model in place over the meshes; gradients are summed over them, never divided.

    Args:
        exchange: implementation of expert parallelism, as in `expert_parallel.split_experts`.
    """
    split_experts(model, ranks.experts, exchange)
    precise_policy = MixedPrecisionPolicy(reduce_dtype=master_dtype(precision), cast_forward_inputs=False)
    sizes = ranks.sizes
    compute_policy = _compute_policy(precision, sizes.replicate * sizes.shard)
    experts_policy = _compute_policy(precision, sizes.replicate * sizes.expert_shard)
    shard = _sharder(ranks.dense, "shard")
    shard_experts = _sharder(ranks.experts, "expert_shard", dim=2 if sizes.experts_by == "width" else 0)
    for block in cast(list[Block], model.blocks):
        _shard_block(
            block,
            partial(shard, mp_policy=precise_policy),
            partial(shard, mp_policy=compute_policy),
            partial(shard_experts, mp_policy=experts_policy),
        )
    shard(model.embed, mp_policy=compute_policy)
    # norm and head stay gathered until backward, which begins with them: freeing them would save nothing
    shard(model.norm, mp_policy=precise_policy, reshard_after_forward=False)
    shard(model.head, mp_policy=compute_policy, reshard_after_forward=False)
    shard(model, mp_policy=precise_policy)
    for module in sharded_modules(model):
        group = param_group(module)
        # a group on one rank is not divided by default, and by 1.0 FSDP would divide it into a temporary
        if group is not None and group.mesh_info.mesh.size() > 1:
            module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    _prefetch(model)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """Every module to which fully_shard was applied."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def param_group(module: FSDPModule) -> Any:
    """FSDP's group of the parameters that it gathers with this module; None if there are none.

    torch has no public interface for its groups; modules that were sharded together share the group object.
    """
    group = module._get_fsdp_state()._fsdp_param_group
    return group if group is not None and group.fsdp_params else None


def param_groups(model: nn.Module) -> list[Any]:
    """FSDP's groups of parameters, in forward order."""
    groups = dict.fromkeys(param_group(module) for module in sharded_modules(model))
    return [group for group in groups if group is not None]


def _compute_policy(precision: PrecisionConfig, ranks: int) -> MixedPrecisionPolicy:
    """The policy of parameters in the compute dtype, of which `ranks` ranks hold a part or a copy.

    precision.reduce is for sums over ranks: on one rank, gradients accumulate in the master dtype.
    """
    master, compute = master_dtype(precision), getattr(torch, precision.compute)
    narrow = ranks > 1 and compute != torch.float64
    return MixedPrecisionPolicy(
        param_dtype=None if compute == master else compute,
        reduce_dtype=getattr(torch, precision.reduce) if narrow else master,
        cast_forward_inputs=False,
    )


def _sharder(mesh: DeviceMesh, dimension: str, dim: int = 0) -> Callable[..., FSDPModule]:
    """fully_shard over one mesh dimension, with replication over "replicate" if it has several ranks (HSDP)."""
    sharded = mesh[dimension] if mesh["replicate"].size() == 1 else mesh["replicate", dimension]
    return partial(
        fully_shard,
        mesh=sharded,
        # freeing gathered weights after forward saves memory only if other ranks hold a part of them
        reshard_after_forward=mesh[dimension].size() > 1,
        shard_placement_fn=(lambda _: Shard(dim)) if dim else None,
    )


def _shard_block(
    block: Block,
    shard_precise: Callable[..., FSDPModule],
    shard_compute: Callable[..., FSDPModule],
    shard_experts: Callable[..., FSDPModule],
) -> None:
    precise: list[nn.Module] = [part for part in block.modules() if isinstance(part, Norm | Router)]
    shard_precise(precise)
    if isinstance(block.ffn, MoE):
        shard_experts(block.ffn.experts)
    shard_compute(block)


def _prefetch(model: Trinity) -> None:
    """Prefetch a block's weights while the previous block computes, in both directions.

    Explicit, because the expert exchange makes the host wait in the middle of a block: implicit prefetching would start
    the next gather only after that wait.
    """
    blocks = cast(list[Block], model.blocks)
    modules: list[list[nn.Module]] = [[model.embed], *(_groups(block) for block in blocks), [model.norm, model.head]]
    groups = cast(list[list[FSDPModule]], modules)  # fully_shard made each an FSDPModule
    for before, after in pairwise(groups):
        before[-1].set_modules_to_forward_prefetch(after)
        after[-1].set_modules_to_backward_prefetch(before[::-1])


def _groups(block: Block) -> list[nn.Module]:
    """A block's FSDP groups in forward order, the block itself last.

    FSDP keeps the group of norms and router on its first module, attention_norm.
    """
    experts: list[nn.Module] = [block.ffn.experts] if isinstance(block.ffn, MoE) else []
    return [block.attention_norm, *experts, block]
