"""Layers of a model that is merged from N frozen ones: each tensor is W = Σ_i W_i·diag(c_i) (DAM, arXiv 2410.08371).

No merged weight is made. As (Σ_i W_i·diag(c_i))·x = Σ_i W_i·(c_i ∘ x), a layer scales its input by each model's
coefficients and adds the products with the frozen weights. So the gradient of c_i is a sum over tokens of x ∘ W_iᵀ·dy,
and no gradient of a whole weight exists. Gains and rows of the embedding are vectors: they are scaled themselves.

A layer computes as one of the models does (the teacher) where `Mode.source` names it: with its frozen weights alone, by
the same products, so that a single model with coefficients of 1 equals its teacher bit for bit.

Each matrix on disk has coefficients of its own: `coefficients` is [P, N, I] for the P matrices that a parameter stacks,
[E, N, I] for the experts, and I is 1 where a matrix has one coefficient per model. FSDP and expert parallelism shard
the first dimension, so a rank holds the coefficients of all N models for what it holds.

Shapes: N models, P stacked matrices, I and O input and output width, ... any leading dimensions, T tokens, D width,
V vocabulary, E experts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trinity_kernels
from trinity.models.layers import (
    Embedding,
    FusedPostNorm,
    FusedPreNorm,
    Head,
    Linear,
    Norm,
    PostNorm,
    QKNorm,
    RMSNorm,
)
from trinity.models.moe import Padding, Router, Routing, RowCounts
from trinity_kernels.norm import wide


class Mode:
    """What all merged layers of a model compute: one of the models, number `source`, or with None the merged one."""

    def __init__(self) -> None:
        self.source: int | None = None


class Mixing(NamedTuple):
    """What the layers of one model have in common.

    models: N.
    teachers: further models that give logits alone: they have weights, numbered after the N, and no coefficients.
    by_column: whether a matrix has a coefficient per input feature; else it has one per model.
    mode: see Mode.
    """

    models: int
    teachers: int
    by_column: bool
    mode: Mode

    def coefficients(self, matrices: int, inputs: int) -> nn.Parameter:
        """Empty coefficients of a number of matrices with the same input width."""
        return nn.Parameter(torch.empty(matrices, self.models, inputs if self.by_column else 1))


class Merged(nn.Module):
    """Base of the merged layers: the frozen weights `weight_0` … of the models and their coefficients.

    Attributes:
        part: which kind of layer it is, a word of `learn` (config.py).
    """

    def __init__(self, mixing: Mixing, part: str) -> None:
        nn.Module.__init__(self)  # not super(): the layers that this one replaces have weights of their own
        self.mixing, self.part = mixing, part

    def add_weights(self, name: str, *shape: int) -> None:
        """Register the frozen weights `name_0` … of all models and teachers."""
        for model in range(self.mixing.models + self.mixing.teachers):
            self.register_parameter(f"{name}_{model}", nn.Parameter(torch.empty(*shape), requires_grad=False))

    def terms(self, name: str, coefficients_NI: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """(weight, its coefficients [I]) of each model that takes part; None: 1, for the teacher."""
        if self.mixing.mode.source is not None:
            return [(getattr(self, f"{name}_{self.mixing.mode.source}"), None)]
        return [(getattr(self, f"{name}_{model}"), coefficients_NI[model]) for model in range(self.mixing.models)]


def scaled(x: Tensor, coefficients_I: Tensor | None) -> Tensor:
    """x ∘ c, or x where the teacher computes."""
    return x if coefficients_I is None else x * coefficients_I


def total(terms: list[Tensor]) -> Tensor:
    """The sum, in order; a single term is returned as it is."""
    result = terms[0]
    for term in terms[1:]:
        result = result + term
    return result


class MergedLinear(Merged):
    """Linear, merged; each stacked matrix with coefficients of its own."""

    def __init__(self, layer: Linear, mixing: Mixing, part: str) -> None:
        super().__init__(mixing, part)
        self.rows, inputs = layer.rows, layer.weight.shape[1]
        self.add_weights("weight", sum(self.rows), inputs)
        self.coefficients = mixing.coefficients(len(self.rows), inputs)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] → [..., O], x's dtype."""
        parts, first = [], 0
        for rows, coefficients_NI in zip(self.rows, self.coefficients):
            products = [
                trinity_kernels.linear(scaled(x, c_I), weight[first : first + rows])
                for weight, c_I in self.terms("weight", coefficients_NI)
            ]
            parts.append(total(products))
            first += rows
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class MergedNorm(Merged):
    """A norm whose gain is merged; the kinds of norm below give the forward pass."""

    def __init__(self, layer: Norm, mixing: Mixing, part: str) -> None:
        super().__init__(mixing, part)
        self.eps, self.initial_gain, self.kernel = layer.eps, layer.initial_gain, layer.kernel
        (width,) = layer.gain.shape
        self.add_weights("weight", width)
        self.coefficients = mixing.coefficients(1, width)

    @property
    def gain(self) -> Tensor:
        """Σ_i c_i ∘ g_i."""
        return total([scaled(gain, c_I) for gain, c_I in self.terms("weight", self.coefficients[0])])


def _norm(kind: type[Norm]) -> type:
    # no annotations: `gain` is a property here and a parameter in Norm
    return type(f"Merged{kind.__name__}", (MergedNorm, kind), {"__doc__": f"{kind.__name__}, merged."})


NORMS: dict[type[Norm], type] = {kind: _norm(kind) for kind in (RMSNorm, PostNorm, FusedPreNorm, FusedPostNorm, QKNorm)}
"""Kind of norm → its merged kind; instances of both are instances of Norm."""


class MergedEmbedding(Merged):
    """Embedding, merged: a coefficient per dimension of the token's vector."""

    def __init__(self, layer: Embedding, mixing: Mixing, part: str) -> None:
        super().__init__(mixing, part)
        self.scale = layer.scale
        self.add_weights("weight", *layer.weight.shape)
        self.coefficients = mixing.coefficients(1, layer.weight.shape[1])

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """[B, S] int64 → [B, S, D]."""
        rows = [
            scaled(F.embedding(tokens_BS, weight), c_I) for weight, c_I in self.terms("weight", self.coefficients[0])
        ]
        return total(rows) * self.scale


class MergedHead(Merged):
    """LM head, merged. Its forward also compares merged and teacher's logits: FSDP2 gathers its weights only there."""

    def __init__(self, layer: Head, mixing: Mixing, part: str) -> None:
        super().__init__(mixing, part)
        self.add_weights("weight", *layer.weight.shape)
        self.coefficients = mixing.coefficients(1, layer.weight.shape[1])

    def forward(self, x: Tensor, compare: "Compare | None" = None) -> Tensor:
        """Logits [..., V] of x [..., D]; with `compare`, its result on x and this layer."""
        return self.logits(x) if compare is None else compare(x, self)

    def logits(self, x: Tensor) -> Tensor:
        """[..., D] → [..., V], by the mode."""
        terms = self.terms("weight", self.coefficients[0])
        return total([trinity_kernels.linear(scaled(x, c_I), weight) for weight, c_I in terms])

    def teacher_logits(self, x: Tensor, source: int) -> Tensor:
        """[..., D] → [..., V], by model `source` alone."""
        return trinity_kernels.linear(x, getattr(self, f"weight_{source}"))


class Compare:
    """A function of the head's input and the head; see loss.Distillation."""

    def __call__(self, x: Tensor, head: MergedHead) -> Tensor:
        """Any tensor."""
        raise NotImplementedError


class MergedRouter(Merged, Router):
    """Router, merged: W by column, in fp32, and the models' balancing biases by their mean.

    The biases have no gradient: they choose experts and are in no output.
    """

    def __init__(self, layer: Router, mixing: Mixing, part: str) -> None:
        Merged.__init__(self, mixing, part)
        self.kernel, self.active, self.route_scale = layer.kernel, layer.active, layer.route_scale
        experts, width = layer.weight.shape
        self.add_weights("weight", experts, width)
        self.coefficients = mixing.coefficients(1, width)
        self.biases: Tensor
        self.register_buffer("biases", torch.empty(mixing.models + mixing.teachers, experts, dtype=torch.float32))

    def forward(
        self, x_TD: Tensor, bias_E: Tensor, rows: int = 1, with_sequence_loss: bool = True,
        padding: Padding | None = None, row_counts: RowCounts | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Routing]:  # fmt: skip
        """As Router.forward; `bias_E`, the buffer of the MoE layer, is not used."""
        return super().forward(x_TD, self.bias(), rows, with_sequence_loss, padding, row_counts)

    def bias(self) -> Tensor:
        """[E] fp32: the teacher's bias, or the mean."""
        if self.mixing.mode.source is not None:
            return self.biases[self.mixing.mode.source]
        return total([bias_E * (1.0 / self.mixing.models) for bias_E in self.biases[: self.mixing.models]])

    def scores(self, x_TD: Tensor) -> Tensor:
        """σ(Σ_i W_i·(c_i ∘ x)), [T, E], in fp32, or float64 for a float64 model."""
        x_TD = wide(x_TD)
        terms = self.terms("weight", self.coefficients[0])
        return total([F.linear(scaled(x_TD, c_I), weight) for weight, c_I in terms]).sigmoid()
