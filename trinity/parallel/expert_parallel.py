"""Expert parallelism: split the experts of each MoE layer among the ranks of a group, and dispatch tokens between them.

Rank p of the P ranks holds experts [p·E/P, (p+1)·E/P). The exchange itself is trinity.parallel.token_dispatcher
(all-to-all) or trinity.parallel.deep_ep.

Shapes: E experts, P ranks.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from trinity.models.moe import Dispatcher, MoE, keep_gradient_wide
from trinity.parallel.token_dispatcher import AllToAll


def split_experts(model: nn.Module, mesh: DeviceMesh, exchange: str = "auto") -> None:
    """Keep on each rank its share of the experts, along mesh["expert"], and dispatch tokens; apply before FSDP.

    Args:
        model: its MoE layers change in place; experts' parameters become DTensors of the same values.
        mesh: the mesh of experts of trinity.parallel.mesh; nothing changes if its "expert" has one rank.
        exchange: "all_to_all", "deep_ep" (trinity.parallel.deep_ep), or "auto", which is all_to_all.
    Raises:
        UserError: exchange is deep_ep, and the package is not installed.
    """
    expert_mesh = mesh["expert"]
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if expert_mesh.size() == 1 or not layers:
        return
    dispatcher = _make_dispatcher(exchange, expert_mesh.get_group(), len(layers[0].get_buffer("expert_bias")))
    for layer in layers:
        layer.dispatcher = dispatcher
        layer.experts.local_part = local_part
        for name, parameter in list(layer.experts.named_parameters()):
            # a clone: a view would keep the other ranks' experts in memory
            part = parameter.detach().chunk(expert_mesh.size())[expert_mesh.get_local_rank()].clone()
            split = DTensor.from_local(part, expert_mesh, [Shard(0)], run_check=False)
            setattr(layer.experts, name, nn.Parameter(split, requires_grad=parameter.requires_grad))


def local_part(weight: Tensor, wide_gradient: bool) -> Tensor:
    """This rank's part of an expert weight that is a DTensor.

    With wide_gradient the part is a leaf that shares memory with the weight, and its gradient is this rank's part of
    the weight's gradient: what backward adds to a leaf's gradient in place, it adds to the weight's. Nothing may
    replace the weight's gradient between a forward pass and its backward pass. Otherwise the part's gradient reaches
    the weight through DTensor, rounded to the weight's dtype.
    """
    if not (wide_gradient and torch.is_grad_enabled() and weight.requires_grad):
        return _local(weight)
    with torch.no_grad():  # nothing here is an operation of autograd
        part = _local(weight).detach().requires_grad_()
        keep_gradient_wide(weight)
        keep_gradient_wide(part)
        if weight.grad is not None:
            part.grad = _local(weight.grad)
    part.register_post_accumulate_grad_hook(partial(_share_gradient, weight))
    return part


def _local(x: Tensor) -> Tensor:
    assert isinstance(x, DTensor), "split the experts first"
    return x.to_local()


def _share_gradient(weight: Tensor, part: Tensor) -> None:
    """After backward made the part's gradient, or added to it: make it the weight's gradient, or add it there."""
    assert isinstance(weight, DTensor)
    assert part.grad is not None
    if weight.grad is None:
        weight.grad = DTensor.from_local(part.grad, weight.device_mesh, weight.placements, run_check=False)
    elif (gradient := _local(weight.grad)).data_ptr() != part.grad.data_ptr():
        gradient += part.grad  # two forward passes took their parts before the first gradient existed


def _make_dispatcher(exchange: str, group: dist.ProcessGroup, experts: int) -> Dispatcher:
    if exchange == "deep_ep":
        from trinity.parallel.deep_ep import DeepEP

        return DeepEP(group, experts)
    return AllToAll(group, experts)
