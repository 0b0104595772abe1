"""Expert parallelism: split the experts of each MoE layer among the ranks of a group, and dispatch tokens between them.

Rank p of the P ranks holds experts [p·E/P, (p+1)·E/P). The exchange itself is trinity.parallel.token_dispatcher
(all-to-all) or trinity.parallel.deep_ep.

Shapes: E experts, P ranks.
"""

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from trinity.models.moe import Dispatcher, MoE
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
        layer.experts.local_part = DTensor.to_local  # type: ignore[assignment]  # its weights are DTensors from here on
        for name, parameter in list(layer.experts.named_parameters()):
            # a clone: a view would keep the other ranks' experts in memory
            part = parameter.detach().chunk(expert_mesh.size())[expert_mesh.get_local_rank()].clone()
            split = DTensor.from_local(part, expert_mesh, [Shard(0)], run_check=False)
            setattr(layer.experts, name, nn.Parameter(split))


def _make_dispatcher(exchange: str, group: dist.ProcessGroup, experts: int) -> Dispatcher:
    if exchange == "deep_ep":
        from trinity.parallel.deep_ep import DeepEP

        return DeepEP(group, experts)
    return AllToAll(group, experts)
