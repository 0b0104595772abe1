"""Count the tokens that each expert gets while a model is evaluated: MaxVio and dead experts of a text.

A forward pass returns counts over all tokens of its rows, those that fill a row included. These counts leave padding
out: the tokens after a row's last target, and those that the model itself routes to no expert.

Shapes: B rows, S tokens of a row, T = B·S, M MoE layers, E experts, K experts chosen per token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trinity.balancing import dead_share, max_violation
from trinity.models.moe import MoE
from trinity.models.trinity import Trinity
from trinity_kernels.cross_entropy import IGNORE


def moe_layers(model: Trinity) -> list[MoE]:
    """The MoE sublayers of a model, first to last."""
    return [block.ffn for block in model.blocks if isinstance(block.ffn, MoE)]


class ExpertLoad:
    """Context manager: counts the choices of every router in the forward passes of its block.

    Args:
        model: on any device, not sharded; None of its state changes.

    Attributes:
        counts_ME: [M, E] int64, on the CPU.
    """

    def __init__(self, model: Trinity) -> None:
        self._model, self._layers = model, moe_layers(model)
        self._kept_T: Tensor | None = None
        self._handles: list[Any] = []
        self._counts = [torch.zeros(model.config.experts, dtype=torch.int64) for _ in self._layers]

    def __enter__(self) -> "ExpertLoad":
        self._handles = [self._model.register_forward_pre_hook(self._find_padding, with_kwargs=True)]
        for number, layer in enumerate(self._layers):
            self._handles.append(layer.router.register_forward_hook(self._counter(number)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def counts_ME(self) -> Tensor:
        experts = self._model.config.experts
        return torch.stack(self._counts) if self._counts else torch.zeros(0, experts, dtype=torch.int64)

    def metrics(self) -> dict[str, float]:
        """MaxVio and dead experts under their names in metrics.jsonl; empty for a model without MoE layers.

        Returns:
            "max_violation" (eq. 42), of the worst layer; "max_violation_mean", the mean over the layers;
            "dead_experts", the share of experts without a token, the mean over the layers.
        """
        if not self._layers:
            return {}
        violation_M = max_violation(self.counts_ME)
        return {
            "max_violation": violation_M.max().item(),
            "max_violation_mean": violation_M.mean().item(),
            "dead_experts": dead_share(self.counts_ME).mean().item(),
        }

    def _find_padding(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        targets_BS = kwargs.get("targets_BS")
        self._kept_T = None if targets_BS is None else up_to_last_target(targets_BS).flatten()

    def _counter(self, number: int) -> Callable[..., None]:
        def count(router: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            indices_TK = output[2]
            if self._kept_T is not None:
                indices_TK = indices_TK[self._kept_T]
            chosen = indices_TK[indices_TK >= 0]
            self._counts[number] += chosen.bincount(minlength=len(self._counts[number])).cpu()

        return count


def up_to_last_target(targets_BS: Tensor) -> Tensor:
    """[B, S] bool: the tokens up to the last one of their row that has a target."""
    return (targets_BS != IGNORE).flip(1).cummax(dim=1).values.flip(1)
