"""FSDP2 over a model, its precision chosen part by part.

A block-wide bf16 policy would turn router, gains and every buffer into bf16 without a word. So each block is three
groups: norms and router in fp32, experts, and the rest, the last two in the compute dtype. Inputs are never cast by the
wrapper: each operation says itself in which precision it works.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from trinity.config.run import Precision
from trinity.models.layers import RMSNorm
from trinity.models.moe import MoE, Router
from trinity.models.trinity import Block, Trinity


def master_dtype(precision: Precision) -> torch.dtype:
    """Parameters and optimizer state: fp32, or float64 for a run in float64."""
    return torch.float64 if precision.compute == "float64" else torch.float32


def shard_model(model: Trinity, mesh: DeviceMesh, precision: Precision) -> None:
    """Shard a model in place over a mesh whose last dimension shards; gradients are summed over it, never divided."""
    master = master_dtype(precision)
    compute = getattr(torch, precision.compute)
    reduce = getattr(torch, precision.reduce)
    kept = MixedPrecisionPolicy(reduce_dtype=master, cast_forward_inputs=False)
    cast = MixedPrecisionPolicy(
        param_dtype=None if compute == master else compute,
        reduce_dtype=master if compute == torch.float64 else reduce,
        cast_forward_inputs=False,
    )
    # freeing gathered weights after the forward pays only where others hold a part of them
    shard = partial(fully_shard, mesh=mesh, reshard_after_forward=mesh.size(-1) > 1)
    for block in model.blocks:
        _shard_block(block, partial(shard, mp_policy=kept), partial(shard, mp_policy=cast))
    shard(model.embed, mp_policy=cast)
    shard(model.norm, mp_policy=kept)
    shard(model.head, mp_policy=cast)
    shard(model, mp_policy=kept)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _shard_block(block: Block, shard_kept: Callable[..., None], shard_cast: Callable[..., None]) -> None:
    precise: list[nn.Module] = [part for part in block.modules() if isinstance(part, RMSNorm | Router)]
    shard_kept(precise)
    if isinstance(block.ffn, MoE):
        shard_cast(block.ffn.experts)
    shard_cast(block)
