"""Norms of the weights and of one step's updates, by parameter group: they show a part that stalls or diverges."""

import torch
import torch.distributed as dist
from torch import Tensor

from trinity.optim.build import Optimizers
from trinity.optim.dtensor import local_tensor
from trinity.optim.grad_clip import global_norm


class ParamNorms:
    """Measures the parameters of one model.

    Args:
        optimizers: the kinds of their roles are the groups: matrix, router, experts, embedding, gain, head.
        group: the ranks of one replica of the model.
    """

    def __init__(self, optimizers: Optimizers, group: dist.ProcessGroup) -> None:
        self._group = group
        self._parameters: dict[str, list[Tensor]] = {}
        for role in [*optimizers.muon_roles, *optimizers.adamw_roles]:
            self._parameters.setdefault(role.kind, []).append(role.parameter)
        self._before: dict[str, list[Tensor]] | None = None

    @torch.no_grad()
    def snapshot(self) -> None:
        """Copy this rank's parameters to host memory, before a step whose update is to be measured."""
        self._before = {
            kind: [local_tensor(parameter).to("cpu", copy=True) for parameter in parameters]
            for kind, parameters in self._parameters.items()
        }

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """weight_norm.GROUP and update_norm.GROUP of each group; nothing without a snapshot before this step.

        One collective; every rank of the group calls it.
        """
        if self._before is None:
            return {}
        before, self._before = self._before, None
        squares = []
        for kind, parameters in self._parameters.items():
            weights = [local_tensor(parameter) for parameter in parameters]
            updates = [weight - old.to(weight.device) for weight, old in zip(weights, before[kind])]
            squares += [global_norm(weights).double().square(), global_norm(updates).double().square()]
        sums = torch.stack(squares)
        dist.all_reduce(sums, group=self._group)
        norms = iter(sums.sqrt().tolist())
        return {f"{name}_norm.{kind}": next(norms) for kind in self._parameters for name in ("weight", "update")}
