"""Count the tokens that each expert gets while a model is evaluated: MaxVio and dead experts of a text.

A forward pass returns counts over all tokens of its rows, those that fill a row included. These counts leave padding
out: the tokens after a row's last target, and those that the model itself routes to no expert. ExpertLoad counts on one
process, ValidationLoad on any mesh.

Shapes: B rows, S tokens of a row, T = B·S, M MoE layers, E experts, K experts chosen per token.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trinity.balancing import dead_share, max_violation
from trinity.models.moe import MoE
from trinity.models.trinity import Losses, Trinity
from trinity_kernels.cross_entropy import IGNORE


def moe_layers(model: Trinity) -> list[MoE]:
    """The MoE sublayers of a model, first to last."""
    return [block.ffn for block in model.blocks if isinstance(block.ffn, MoE)]


class ExpertLoad:
    """Context manager: counts the choices of every router in the forward passes of its block.

    Args:
        model: on any device; none of its state changes. The counts are those of this process.
        kept_BS: [B, S] bool, the tokens to count in each pass; None: those up to the last target of their row.

    Attributes:
        counts_ME: [M, E] int64, on the CPU.
    """

    def __init__(self, model: Trinity, kept_BS: Tensor | None = None) -> None:
        self._model, self._layers = model, moe_layers(model)
        self._kept_BS, self._kept_T = kept_BS, None if kept_BS is None else kept_BS.flatten()
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
        """See load_metrics."""
        return load_metrics(self.counts_ME)

    def _find_padding(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        targets_BS = kwargs.get("targets_BS")
        if self._kept_BS is None:
            self._kept_T = None if targets_BS is None else up_to_last_target(targets_BS).flatten()

    def _counter(self, number: int) -> Callable[..., None]:
        def count(router: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            indices_TK = output[2]
            if self._kept_T is not None:
                indices_TK = indices_TK[self._kept_T.to(indices_TK.device)]
            chosen = indices_TK[indices_TK >= 0]
            self._counts[number] += chosen.bincount(minlength=len(self._counts[number])).cpu()

        return count


class ValidationLoad:
    """Counts the choices of every router over a validation set that the ranks of a run divide among themselves.

    Args:
        model: sharded or not; none of its state changes.
    """

    def __init__(self, model: Trinity) -> None:
        self._model = model
        self._counts_ME = torch.zeros(len(moe_layers(model)), model.config.experts, dtype=torch.int64)

    def count(self, forward: Callable[[], Losses], kept_BS: Tensor) -> Losses:
        """Run a forward pass, and add the choices of the tokens in kept_BS.

        The pass itself counts all of its tokens, which is enough where all are kept. Otherwise hooks see the choices;
        compiled blocks would not call them, so such a pass is not compiled.

        Args:
            forward: calls the model on this rank's tokens, or its columns of them, [B, S].
            kept_BS: [B, S] bool.
        """
        if kept_BS.all():
            losses = forward()
            counts_ME = losses.counts_ME
        else:
            with ExpertLoad(self._model, kept_BS) as load, torch.compiler.set_stance("force_eager"):
                losses = forward()
            counts_ME = load.counts_ME
        if counts_ME is not None:
            self._counts_ME += counts_ME.cpu()
        return losses

    def metrics(self) -> dict[str, float]:
        """load_metrics of the counts of all ranks; every rank calls this. Equal on all ranks."""
        if dist.is_initialized():
            dist.all_reduce(self._counts_ME)
        return load_metrics(self._counts_ME)


def load_metrics(counts_ME: Tensor) -> dict[str, float]:
    """MaxVio and dead experts under their names in metrics.jsonl; empty for a model without MoE layers.

    Args:
        counts_ME: [M, E] int64, tokens per expert.
    Returns:
        "max_violation" (eq. 42), of the worst layer; "max_violation_mean", the mean over the layers; "dead_experts",
        the share of experts without a token, the mean over the layers.
    """
    if not len(counts_ME):
        return {}
    violation_M = max_violation(counts_ME)
    return {
        "max_violation": violation_M.max().item(),
        "max_violation_mean": violation_M.mean().item(),
        "dead_experts": dead_share(counts_ME).mean().item(),
    }


def up_to_last_target(targets_BS: Tensor) -> Tensor:
    """[B, S] bool: the tokens up to the last one of their row that has a target."""
    return (targets_BS != IGNORE).flip(1).cummax(dim=1).values.flip(1)
