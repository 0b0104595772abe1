"""FSDP2 over a model, its precision chosen part by part.

A block-wide bf16 policy would turn router, gains and every buffer into bf16 without a word. So each block is three
groups: norms and router in fp32, experts, and the rest, the last two in the compute dtype. Inputs are never cast by the
wrapper: each operation says itself in which precision it works.

Experts are cut twice: among neighbouring ranks (`expert`), each computing with its own, and each such part among the
ranks of `expert_shard`, gathered for use. Everything else is cut over `shard`. Gradients are summed, never divided.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

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
    """Parameters and optimizer state: fp32, or float64 for a run in float64."""
    return torch.float64 if precision.compute == "float64" else torch.float32


def shard_model(model: Trinity, ranks: Ranks, precision: PrecisionConfig, exchange: str = "auto") -> None:
    """Shard a model in place over the meshes; gradients are summed over them, never divided.

    Args:
        exchange: how tokens travel to experts on other ranks, see trinity.parallel.exchange.
    """
    split_experts(model, ranks.experts, exchange)
    master = master_dtype(precision)
    compute = getattr(torch, precision.compute)
    reduce = getattr(torch, precision.reduce)
    kept = MixedPrecisionPolicy(reduce_dtype=master, cast_forward_inputs=False)
    cast = MixedPrecisionPolicy(
        param_dtype=None if compute == master else compute,
        reduce_dtype=master if compute == torch.float64 else reduce,
        cast_forward_inputs=False,
    )
    shard = _sharder(ranks.dense, "shard")
    shard_experts = _sharder(ranks.experts, "expert_shard", dim=2 if ranks.sizes.experts_by == "width" else 0)
    for block in model.blocks:
        _shard_block(block, partial(shard, mp_policy=kept), partial(shard, mp_policy=cast), shard_experts, cast)
    shard(model.embed, mp_policy=cast)
    # kept gathered from forward to backward, which begins with them: gathering them again would free nothing
    shard(model.norm, mp_policy=kept, reshard_after_forward=False)
    shard(model.head, mp_policy=cast, reshard_after_forward=False)
    shard(model, mp_policy=kept)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    _prefetch(model)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """Every module that FSDP2 hooks into."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _sharder(mesh: DeviceMesh, dimension: str, dim: int = 0) -> Callable[..., None]:
    """fully_shard over one dimension of a mesh, its copies kept equal where it has several."""
    sharded = mesh[dimension] if mesh["replicate"].size() == 1 else mesh["replicate", dimension]
    return partial(
        fully_shard,
        mesh=sharded,
        # freeing gathered weights after the forward pays only where others hold a part of them
        reshard_after_forward=mesh[dimension].size() > 1,
        shard_placement_fn=(lambda _: Shard(dim)) if dim else None,
    )


def _shard_block(
    block: Block,
    shard_kept: Callable[..., None],
    shard_cast: Callable[..., None],
    shard_experts: Callable[..., None],
    cast: MixedPrecisionPolicy,
) -> None:
    precise: list[nn.Module] = [part for part in block.modules() if isinstance(part, Norm | Router)]
    shard_kept(precise)
    if isinstance(block.ffn, MoE):
        shard_experts(block.ffn.experts, mp_policy=cast)
    shard_cast(block)


def _prefetch(model: Trinity) -> None:
    """Gather a block's weights while the block before it computes, in both directions.

    Said explicitly because the expert exchange makes the host wait in the middle of a block: without it, what comes
    next would be asked for only then.
    """
    groups = [[model.embed], *(_groups(block) for block in model.blocks), [model.norm, model.head]]
    for before, after in pairwise(groups):
        before[-1].set_modules_to_forward_prefetch(after)
        after[-1].set_modules_to_backward_prefetch(before[::-1])


def _groups(block: Block) -> list[FSDPModule]:
    """A block's FSDP groups, in the order in which forward uses them; the block itself last, as it is hooked first."""
    experts = [block.ffn.experts] if isinstance(block.ffn, MoE) else []
    return [block.attention_norm, *experts, block]
