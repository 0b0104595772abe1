"""The merged model: Trinity with N frozen models' weights in every layer, and the coefficients that mix them.

It is built on meta like any Trinity, and sharded by trinity.parallel.fsdp without a change there: FSDP groups hold
frozen weights and coefficients together, and expert parallelism splits both along the experts.

Shapes: B rows, S tokens of a row, D width, V vocabulary, N models.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trinity.config.model import ModelConfig
from trinity.config.run import AUTOMATIC, KernelsConfig
from trinity.dam.experts import MergedExperts
from trinity.dam.layers import (
    NORMS,
    Compare,
    Merged,
    MergedEmbedding,
    MergedHead,
    MergedLinear,
    MergedRouter,
    Mixing,
    Mode,
)
from trinity.models.layers import Embedding, Head, Linear, Norm
from trinity.models.moe import Experts, Router
from trinity.models.trinity import Trinity

PARTS = ("attention", "ffn", "router", "head", "experts", "embedding", "gains")
"""Kinds of layers whose coefficients may be learned. ffn: the dense ones and the shared experts."""


class MergedTrinity(Trinity):
    """A model of `models` frozen ones of the same sizes. Make it on meta, then shard, to_empty and load.

    Args:
        config: the sizes of each.
        models: N.
        teachers: further models that give logits and no weights.
        by_column: one coefficient per input feature of each matrix, or one per matrix.
        learn: the parts whose coefficients are trained; the others keep theirs.
        kernels: as for Trinity.
    """

    def __init__(
        self, config: ModelConfig, models: int, teachers: int, by_column: bool, learn: tuple[str, ...],
        kernels: KernelsConfig = AUTOMATIC,
    ) -> None:  # fmt: skip
        super().__init__(config, kernels)
        self.mode, self.models, self.learn = Mode(), models, learn
        _replace_layers(self, Mixing(models, teachers, by_column, self.mode), "")

    @contextmanager
    def as_source(self, source: int) -> Iterator[None]:
        """Context manager: compute as one of the models does, number `source`; teachers come after the N."""
        self.mode.source = source
        try:
            yield
        finally:
            self.mode.source = None

    def forward(  # type: ignore[override]  # it returns no losses of its own
        self, tokens_BS: Tensor, document_ids_BS: Tensor | None = None, compare: Compare | None = None
    ) -> Tensor:
        """Logits [B, S, V]; with `compare`, what it makes of the head's input [B, S, D] and the head.

        Args:
            tokens_BS: [B, S] int64.
            document_ids_BS: as in Trinity.forward.
        """
        positions_BS, mask = self._mask_of_rows(tokens_BS, None, document_ids_BS, None, None)
        x_BSD, _ = self._hidden(tokens_BS, positions_BS, mask, False, None, None)
        return self.head(self.norm(x_BSD), compare)

    def freeze(self) -> None:
        """Train the coefficients of the parts to learn alone; to be called after sharding, before the first pass.

        Splitting the experts makes new parameters, which all have gradients.
        """
        for layer in merged_layers(self).values():
            for name, parameter in layer.named_parameters(recurse=False):
                parameter.requires_grad_(name.endswith("coefficients") and layer.part in self.learn)


def merged_layers(model: nn.Module) -> dict[str, Merged]:
    """Name → merged layer, in the order of the modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Merged)}


def coefficients_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → all coefficients, learned or not."""
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith("coefficients")}


def _replace_layers(module: nn.Module, mixing: Mixing, path: str) -> None:
    """Put merged layers in place of all layers with weights below a module."""
    for name, child in list(module.named_children()):
        where = f"{path}.{name}"
        if isinstance(child, Linear):
            part = "attention" if ".attention." in where else "ffn"
            setattr(module, name, MergedLinear(child, mixing, part))
        elif isinstance(child, Norm):
            setattr(module, name, NORMS[type(child)](child, mixing, "gains"))
        elif isinstance(child, Router):
            setattr(module, name, MergedRouter(child, mixing, "router"))
        elif isinstance(child, Experts):
            setattr(module, name, MergedExperts(child, mixing, "experts"))
        elif isinstance(child, Embedding):
            setattr(module, name, MergedEmbedding(child, mixing, "embedding"))
        elif isinstance(child, Head):
            setattr(module, name, MergedHead(child, mixing, "head"))
        else:
            _replace_layers(child, mixing, where)


class Hidden(Compare):
    """The head's input itself: what a teacher's pass returns, so that its logits are made in chunks, with the loss."""

    def __call__(self, x: Tensor, head: MergedHead) -> Tensor:
        """x."""
        return x


def hidden_states(model: MergedTrinity, source: int, tokens_BS: Tensor, ids_BS: Tensor | None = None) -> Tensor:
    """[B, S, D]: the head's input in model `source`; without a graph."""
    with torch.no_grad(), model.as_source(source):
        return model(tokens_BS, ids_BS, Hidden())
