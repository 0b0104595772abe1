"""Gradient accumulation over microbatches: reduce after each one, or keep unreduced gradients until the last.

Reducing after each microbatch stores a shard of the gradient and communicates all of it once per microbatch. Deferring
stores all of it and communicates once per step. The all-reduce over replicas always waits for the last microbatch,
which costs no memory.
"""

import os
from typing import Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from trinity.models.moe import Experts
from trinity.models.param_roles import parameter_roles
from trinity.parallel.mesh import Ranks

# Largest fraction of the device's memory for unreduced gradients under `auto`. Not from the report: a round number.
SHARE_OF_DEVICE = 0.25


def set_reduction(model: nn.Module, last: bool, defer: bool) -> None:
    """Set how the gradients of the next microbatch are reduced.

    Args:
        model: sharded by shard_model.
        last: whether the microbatch is the last of its step.
        defer: whether gradients stay unreduced until the last.
    """
    assert isinstance(model, FSDPModule), "shard the model first"
    model.set_requires_gradient_sync(last or not defer)
    model.set_requires_all_reduce(last)
    for module in model.modules():
        if isinstance(module, Experts):
            module.wide_gradient = defer


def defers_reduction(setting: Literal["auto", "on", "off"], model: nn.Module, ranks: Ranks) -> bool:
    """Whether parallel.defer_reduce=`setting` defers: `auto` does if shards are on several ranks and memory allows."""
    if setting != "auto":
        return setting == "on"
    if ranks.sizes.shard == 1:
        return False
    return unreduced_bytes(model, ranks.sizes.expert) <= SHARE_OF_DEVICE * device_bytes(ranks.device)


def unreduced_bytes(model: nn.Module, expert: int) -> float:
    """Bytes of one rank's unreduced gradient, in the parameters' dtype; of the experts, 1/`expert` of them."""
    return sum(
        role.parameter.numel() * role.parameter.element_size() / (expert if role.kind == "experts" else 1)
        for role in parameter_roles(model)
    )


def device_bytes(device: torch.device) -> float:
    """Memory of the GPU, or of this machine divided by its processes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
