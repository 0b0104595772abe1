"""Gradients over the microbatches of a step: reduced after each, or kept whole on every rank until the last.

Reducing each time holds a shard of the gradient and moves all of it once a microbatch; keeping holds all of it and
moves it once a step. Copies of the model are never reduced over before the last microbatch: that costs no memory.
"""

import os
from typing import Literal

import torch
from torch import nn

from trinity.models.moe import Experts
from trinity.models.param_roles import parameter_roles
from trinity.parallel.mesh import Ranks

# The most of a device that unreduced gradients may take under `auto`. Ours.
SHARE_OF_DEVICE = 0.25


def set_reduction(model: nn.Module, last: bool, defer: bool) -> None:
    """Say before a microbatch what happens to its gradients.

    Args:
        model: sharded by shard_model.
        last: whether it is the step's last.
        defer: whether gradients stay unreduced until then.
    """
    model.set_requires_gradient_sync(last or not defer)
    model.set_requires_all_reduce(last)
    for module in model.modules():
        if isinstance(module, Experts):
            module.wide_gradient = defer


def defers_reduction(asked: Literal["auto", "on", "off"], model: nn.Module, ranks: Ranks) -> bool:
    """What parallel.defer_reduce means here: `auto` defers where other ranks hold shards and all of it fits."""
    if asked != "auto":
        return asked == "on"
    if ranks.sizes.shard == 1:
        return False
    return unreduced_bytes(model, ranks.sizes.expert) <= SHARE_OF_DEVICE * device_bytes(ranks.device)


def unreduced_bytes(model: nn.Module, expert: int) -> float:
    """Bytes of one rank's whole gradient, in the parameters' own format: of the experts, its share among `expert`."""
    return sum(
        role.parameter.numel() * role.parameter.element_size() / (expert if role.kind == "experts" else 1)
        for role in parameter_roles(model)
    )


def device_bytes(device: torch.device) -> float:
    """Memory of the GPU, or of this machine divided by the processes on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
