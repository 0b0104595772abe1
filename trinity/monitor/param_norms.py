"""Norms of weights and of one step's updates, by group of parameters: whether a part stands still or runs away."""

import torch
import torch.distributed as dist
from torch import Tensor

from trinity.optim.build import Optimizers
from trinity.optim.dtensor import local_tensor
from trinity.optim.grad_clip import global_norm


class ParamNorms:
    """Measures the parameters of one model.

    Args:
        optimizers: their roles name the groups: matrix, router, experts, embedding, gain, head.
        group: the ranks that hold one copy of the model among them.
    """

    def __init__(self, optimizers: Optimizers, group: dist.ProcessGroup) -> None:
        self._group = group
        self._parameters: dict[str, list[Tensor]] = {}
        for role in [*optimizers.muon_roles, *optimizers.adamw_roles]:
            self._parameters.setdefault(role.kind, []).append(role.parameter)
        self._before: dict[str, list[Tensor]] | None = None

    @torch.no_grad()
    def remember(self) -> None:
        """Copy what this rank holds to host memory, before a step whose update is to be measured."""
        self._before = {
            kind: [local_tensor(parameter).to("cpu", copy=True) for parameter in parameters]
            for kind, parameters in self._parameters.items()
        }

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """weight_norm.GROUP and update_norm.GROUP of each group; nothing where remember was not called for this step.

        One collective; every rank of the group calls it.
        """
        if self._before is None:
            return {}
        before, self._before = self._before, None
        squares = []
        for kind, parameters in self._parameters.items():
            now = [local_tensor(parameter) for parameter in parameters]
            moved = [part - old.to(part.device) for part, old in zip(now, before[kind])]
            squares += [global_norm(now).double().square(), global_norm(moved).double().square()]
        sums = torch.stack(squares)
        dist.all_reduce(sums, group=self._group)
        norms = iter(sums.sqrt().tolist())
        return {f"{what}_norm.{kind}": next(norms) for kind in self._parameters for what in ("weight", "update")}
