"""FSDP groups that need no communication: their weights are used, and their gradients kept, where they are.

A group with one shard has nothing to gather; one that has no copy on another rank either has nothing to reduce. FSDP
copies them all the same, every microbatch: the weights (10 bytes a parameter in bf16, 8 in fp32) and the gradients (26
in bf16, 28 in fp32, from the second microbatch on; a division by 1 is 8 more). Here instead:

    weights     in the master dtype, modules compute with the shard's own memory; in another dtype, the cast is kept
                until the last microbatch (grad_accumulation.py)
    gradients   accumulate where autograd leaves them; after the last microbatch they are handed to the parameters
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from trinity.parallel.fsdp import param_groups


def is_whole(group: Any) -> bool:
    """Whether this rank holds all of the weights of an FSDP group: the group has one shard."""
    return group.mesh_info.shard_mesh_size == 1


def is_local(group: Any) -> bool:
    """Whether an FSDP group has one shard and one replica: its gradients are reduced with nobody's."""
    return group.mesh_info.mesh.size() == 1


def computes_in_place(group: Any) -> bool:
    """Whether the modules of an FSDP group compute with the memory of its shards: whole, and in the master dtype."""
    return is_whole(group) and group.mp_policy.param_dtype is None


def use_weights_in_place(model: nn.Module) -> None:
    """Let the modules compute with the memory of their shards, without a copy, in groups that allow it.

    It uses FSDP's extension of the all-gather, which a local tensor announces by two attributes: the first gives FSDP
    nothing to gather, the second returns the shard itself as the gathered weight. To be called once, after the
    parameters have their memory; later, parameters may only be changed in place.

    Args:
        model: sharded by shard_model, on its device.
    """
    for group in param_groups(model):
        if computes_in_place(group):
            for parameter in group.fsdp_params:
                _compute_with(parameter.sharded_param._local_tensor)


def take_gradients(model: nn.Module) -> None:
    """Give the accumulated gradients of local groups to their sharded parameters, in the parameters' dtype.

    To be called after the backward pass of the last microbatch, if FSDP did not reduce (`set_reduction` with defer).
    Nothing is copied. As after a reduction, a gradient that is there already is added to, and the parameter's
    post-accumulate hooks run.
    """
    for group in param_groups(model):
        if is_local(group):
            for parameter in group.fsdp_params:
                _take_gradient(parameter)


def _compute_with(local: Tensor) -> None:
    """Make FSDP take `local`, the shard of a parameter, as the gathered parameter."""
    # these functions become attributes of the tensor: a reference to it would keep it alive for ever
    shard, dtype, device = weakref.ref(local), local.dtype, local.device

    def pre_all_gather(_mesh: DeviceMesh) -> tuple[tuple[Tensor, ...], None]:
        return (torch.empty(0, dtype=dtype, device=device),), None

    def post_all_gather(
        _gathered: tuple[Tensor, ...], _metadata: None, _dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[()]] | None:
        whole = shard()
        assert whole is not None, "the parameter's tensor was replaced; only change parameters in place"
        return (whole.detach(), ()) if out is None else None  # `out` is the first call's result

    local.fsdp_pre_all_gather, local.fsdp_post_all_gather = pre_all_gather, post_all_gather  # type: ignore[attr-defined]


def _take_gradient(parameter: Any) -> None:
    """Hand over the gradient of one FSDPParam; it is None for a parameter without a backward pass."""
    unsharded, sharded = getattr(parameter, "_unsharded_param", None), parameter.sharded_param
    if parameter.unsharded_accumulated_grad is not None:
        gradient = parameter.unsharded_accumulated_grad_data
    elif unsharded is not None and unsharded.grad is not None:
        gradient = parameter.unsharded_grad_data
    else:
        return
    parameter.unsharded_accumulated_grad = parameter._unsharded_param.grad = None
    shard = parameter.to_sharded_dtensor(gradient.to(sharded.dtype))
    sharded.grad = shard if sharded.grad is None else sharded.grad + shard
    for hook in (getattr(sharded, "_post_accumulate_grad_hooks", None) or {}).values():
        hook(sharded)
