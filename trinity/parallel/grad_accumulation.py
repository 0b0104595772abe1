"""Gradient accumulation over microbatches: what FSDP reduces and frees after each, and what it keeps until the last.

Reducing after each microbatch stores a shard of the gradient and communicates all of it once per microbatch. Deferring
stores all of it and communicates once per step. The all-reduce over replicas always waits for the last microbatch,
which costs no memory. A group on one rank has nothing to reduce: deferred, its gradient is never copied.

Weights that are whole on this rank stay whole, in the compute dtype, until the last microbatch: they take that memory
at the end of each forward pass anyway.
"""

import os
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from trinity.models.moe import Experts
from trinity.parallel.fsdp import param_group, param_groups, sharded_modules
from trinity.parallel.mesh import Ranks
from trinity.parallel.one_rank_groups import is_local, is_whole, take_gradients

# Largest fraction of the device's memory for unreduced gradients under `auto`. Not from the report: a round number.
SHARE_OF_DEVICE = 0.25


def set_reduction(model: nn.Module, last: bool, defer: bool) -> None:
    """Set how the next microbatch's gradients are reduced, and whether gathered weights are freed after it.

    Args:
        model: sharded by shard_model.
        last: whether the microbatch is the last of its step.
        defer: whether gradients stay unreduced until the last; those of groups on one rank until `end_accumulation`.
    """
    assert isinstance(model, FSDPModule), "shard the model first"
    for module in sharded_modules(model):
        group = param_group(module)
        if group is None:
            continue
        reduces = not defer if is_local(group) else last or not defer
        module.set_requires_gradient_sync(reduces, recurse=False)
        module.set_requires_all_reduce(last, recurse=False)
        module.set_reshard_after_backward(last or not is_whole(group), recurse=False)
    for experts in model.modules():
        if isinstance(experts, Experts):
            experts.wide_gradient = defer and _may_use_triton(experts)


def _may_use_triton(experts: Experts) -> bool:
    """Whether Triton may compute the experts, which adds to wide gradients; others would only cast theirs."""
    return experts.kernel == "triton" or (experts.kernel == "auto" and experts.gate_up.device.type == "cuda")


def end_accumulation(model: nn.Module) -> None:
    """After the last microbatch's backward pass: every parameter has its gradient, and FSDP its defaults.

    Args:
        model: sharded by shard_model; set_reduction was called with last=True before its last forward pass.
    """
    assert isinstance(model, FSDPModule), "shard the model first"
    take_gradients(model)
    model.set_requires_gradient_sync(True)


def defers_reduction(setting: Literal["auto", "on", "off"], model: nn.Module, ranks: Ranks, microbatches: int) -> bool:
    """Whether a step with parallel.defer_reduce=`setting` defers. `auto` does if memory allows.

    With one microbatch there is nothing to defer, except that groups on one rank are then not copied.
    """
    if setting == "off" or (microbatches == 1 and not any(is_local(group) for group in param_groups(model))):
        return False
    return setting == "on" or deferral_bytes(model) <= SHARE_OF_DEVICE * device_bytes(ranks.device)


def unreduced_bytes(model: nn.Module) -> float:
    """Bytes of one rank's unreduced gradient, in the parameters' dtype."""
    return sum(_unsharded_bytes(group) for group in param_groups(model))


def deferral_bytes(model: nn.Module) -> float:
    """Bytes that an unreduced gradient takes in addition to its shards; 0 where every group has one shard."""
    return sum(_unsharded_bytes(group) * (1 - 1 / group.mesh_info.shard_mesh_size) for group in param_groups(model))


def _unsharded_bytes(group: Any) -> int:
    """Bytes of a group's trained parameters in the master dtype; of split experts, this rank's share."""
    return sum(
        parameter._orig_size.numel() * parameter.sharded_param.element_size()
        for parameter in group.fsdp_params
        if parameter.sharded_param.requires_grad
    )


def device_bytes(device: torch.device) -> float:
    """Memory of the GPU, or of this machine divided by its processes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
