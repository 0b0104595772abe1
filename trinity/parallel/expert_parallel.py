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
            setattr(layer.experts, name, nn.Parameter(split))


def local_part(weight: Tensor, wide_gradient: bool) -> Tensor:
    """This rank's part of an expert weight that is a DTensor, and the part of its gradient with it.

    With wide_gradient it is a leaf that shares memory with the weight's part, and its gradient with the weight's
    gradient: a backward pass that adds to a leaf's gradient in place adds to the weight's. Between a forward pass and
    its backward pass nothing may replace the weight's gradient. Otherwise autograd passes the gradient on to the weight,
    through DTensor, which rounds it to the weight's dtype.
    """
    assert isinstance(weight, DTensor), "split the experts first"
    if not (wide_gradient and torch.is_grad_enabled() and weight.requires_grad):
        return weight.to_local()
    with torch.no_grad():  # to_local is then not an operation of autograd
        part = weight.to_local().detach().requires_grad_()
        keep_gradient_wide(weight)
        keep_gradient_wide(part)
        if weight.grad is not None:
            part.grad = weight.grad.to_local()
    part.register_post_accumulate_grad_hook(partial(_share_gradient, weight))
    return part


def _share_gradient(weight: DTensor, part: Tensor) -> None:
    """After the part's gradient was created or added to: make it the weight's gradient, or add it, if it is not yet."""
    if weight.grad is None:
        weight.grad = DTensor.from_local(part.grad, weight.device_mesh, weight.placements, run_check=False)
    elif (gradient := weight.grad.to_local()).data_ptr() != part.grad.data_ptr():
        gradient += part.grad  # another forward pass took its part before this gradient existed


def _make_dispatcher(exchange: str, group: dist.ProcessGroup, experts: int) -> Dispatcher:
    if exchange == "deep_ep":
        from trinity.parallel.deep_ep import DeepEP

        return DeepEP(group, experts)
    return AllToAll(group, experts)
