"""The merge methods: each a pure function of tensors and parameters, and a row of METHODS.

A function takes the `Inputs` of one tensor and the method's parameters, one number per model or one for the tensor, and
returns the function that merges one block. Experts are tensors of their own, so no method ever mixes two experts.

Symbols: W_i the models' tensors, w_i their weights, B the base's, δ_i = W_i - B, λ the parameter lambda (lambda_ here).

To add a method: a function here, or in the file of its family, and a row in METHODS; parameters that no other method
has also get a row in `parameters.PARAMETERS`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trinity.merging import sparse, spherical
from trinity.merging.inputs import Block, Combine, Inputs
from trinity.merging.selection import quantiles

REQUIRED = object()
"""The default of a parameter that the recipe must give."""


def linear(inputs: Inputs, weight: list[float], normalize: bool) -> Combine:
    """Σ w_i W_i / Σ w_i; without `normalize`, Σ w_i W_i."""
    total = math.fsum(weight) if normalize else 1.0
    return lambda block: _sum(block.models, [w / total for w in weight])


def mean(inputs: Inputs) -> Combine:
    """The mean of the models."""
    return linear(inputs, [1.0] * inputs.models, True)


def interpolate(inputs: Inputs, t: float) -> Combine:
    """(1-t) B + t W."""
    return lambda block: (block.origin * (1 - t)).add_(block.models[0], alpha=t)


def task_arithmetic(inputs: Inputs, weight: list[float], normalize: bool, lambda_: float) -> Combine:
    """B + λ Σ w_i δ_i; with `normalize`, divided by Σ w_i (arXiv 2212.04089)."""
    scale = lambda_ / (math.fsum(weight) if normalize else 1.0)
    return lambda block: _sum(block.deltas(), [w * scale for w in weight]).add_(block.origin)


def model_stock(inputs: Inputs, filter_wise: bool) -> Combine:
    """t · mean(W) + (1-t) B, t = Nc/(1 + (N-1)c), c the mean cosine of two δ_i, of the tensor or of each row.

    arXiv 2403.19522. N is the number of models without the base; where a δ is 0, c is 0.
    """
    n = inputs.models
    if not filter_wise:
        products = sum(spherical.inner_products(block.deltas()) for block in inputs)
        assert isinstance(products, Tensor)
        t = float(_stock_ratio(products, n))
        return lambda block: (block.origin * (1 - t)).add_(_sum(block.models, [t / n] * n))

    def combine(block: Block) -> Tensor:
        rows = torch.stack(block.deltas(), dim=1).double()  # [R, N, C]
        t = _stock_ratio(rows @ rows.transpose(1, 2), n).float().unsqueeze(1)
        return block.origin * (1 - t) + _sum(block.models, [1 / n] * n) * t

    return combine


def nearswap(inputs: Inputs, t: float) -> Combine:
    """wW + (1-w)B with w = clamp(t/|B - W|, 0, 1): W where it is within t of B, near B where it is far."""

    def combine(block: Block) -> Tensor:
        delta = block.delta(0)
        weight = (t / delta.abs().clamp_min(1e-38)).clamp_(0, 1)
        return delta.mul_(weight).add_(block.origin)

    return combine


def arcee_fusion(inputs: Inputs) -> Combine:
    """Take W where its importance is at least median + 1.5 · (q75 - q25), else B.

    importance = |δ| · KL(softmax of W's row ‖ softmax of B's row).
    """
    q25, median, q75 = quantiles(
        lambda: ((block.first, _importance(block)) for block in inputs), [0.25, 0.5, 0.75], inputs.count
    )
    threshold = median + 1.5 * (q75 - q25)
    return lambda block: torch.where(_importance(block) >= threshold, block.models[0], block.origin)


def ram(inputs: Inputs, epsilon: float) -> Combine:
    """Add the δ of entries that one model changed (|δ| > ε), average them where several did (arXiv 2601.13572)."""
    return _ram(epsilon, [1.0] * inputs.models)


def ramplus_tl(inputs: Inputs, epsilon: float, r: float, alpha: float) -> Combine:
    """ram, with what model i alone changed times 1 + r·clip(ρ_i, 0, α), ρ_i its shared entries over its own ones.

    Counted in each tensor.
    """
    shared = torch.zeros(inputs.models, dtype=torch.int64)
    alone = torch.zeros_like(shared)
    for block in inputs:
        changed = _changed(block, epsilon)
        count = torch.stack(changed).sum(0)
        shared += torch.stack([(each & (count > 1)).sum() for each in changed])
        alone += torch.stack([(each & (count == 1)).sum() for each in changed])
    ratio = shared.double() / alone.clamp_min(1)
    return _ram(epsilon, (1 + r * ratio.clamp(0, alpha)).tolist())


def passthrough(inputs: Inputs, scale: list[float]) -> Combine:
    """A copy, times `scale`."""
    return lambda block: block.models[0] * scale[0]


@dataclass(frozen=True)
class Method:
    """One row of METHODS.

    merge: the function.
    base: whether it needs a base_model: "no" (one that is not among the models only lends its config), "yes", "may".
    models: least and most number of models besides the base; None: no limit.
    per_model, whole: parameter → default, of each model or of the whole merge.
    smooth: the function for gains, expert_bias and routers in a recipe without a rule for them, where dropping entries
        or turning directions makes no sense; None: `merge`. Its parameters are among those of the method.
    """

    merge: Callable[..., Combine]
    base: str
    models: tuple[int, int | None]
    per_model: dict[str, Any] = field(default_factory=dict)
    whole: dict[str, Any] = field(default_factory=dict)
    smooth: Callable[..., Combine] | None = None


_TASK = {"normalize": False, "lambda": 1.0}
_W, _D = {"weight": REQUIRED}, {"weight": REQUIRED, "density": 1.0}

METHODS: dict[str, Method] = {
    "linear": Method(linear, "no", (1, None), _W, {"normalize": True}),
    "slerp": Method(spherical.slerp, "yes", (1, 1), {}, {"t": REQUIRED}, interpolate),
    "nuslerp": Method(
        spherical.nuslerp, "may", (2, 2), _W, {"nuslerp_flatten": True, "nuslerp_row_wise": False}, linear
    ),
    "multislerp": Method(spherical.multislerp, "may", (2, None), _W, {"normalize_weights": True, "eps": 1e-8}, linear),
    "karcher": Method(spherical.karcher, "no", (2, None), {}, {"max_iter": 10, "tol": 1e-5}, mean),
    "task_arithmetic": Method(task_arithmetic, "yes", (1, None), _W, _TASK),
    "ties": Method(sparse.ties, "yes", (1, None), _D, _TASK | {"normalize": True}, task_arithmetic),
    "dare_linear": Method(sparse.dare_linear, "yes", (1, None), _D, _TASK | {"rescale": "l1"}, task_arithmetic),
    "dare_ties": Method(sparse.dare_ties, "yes", (1, None), _D, _TASK | {"rescale": "l1"}, task_arithmetic),
    "della": Method(sparse.della, "yes", (1, None), _D | {"epsilon": 0.15}, _TASK | {"rescale": "l1"}, task_arithmetic),
    "della_linear": Method(
        sparse.della_linear, "yes", (1, None), _D | {"epsilon": 0.15}, _TASK | {"rescale": "l1"}, task_arithmetic
    ),
    "breadcrumbs": Method(sparse.breadcrumbs, "yes", (1, None), _D | {"gamma": 0.01}, _TASK, task_arithmetic),
    "breadcrumbs_ties": Method(sparse.breadcrumbs_ties, "yes", (1, None), _D | {"gamma": 0.01}, _TASK, task_arithmetic),
    "sce": Method(sparse.sce, "yes", (1, None), {}, {"select_topk": 1.0}),
    "model_stock": Method(model_stock, "yes", (2, None), {}, {"filter_wise": False}),
    "nearswap": Method(nearswap, "yes", (1, 1), {}, {"t": REQUIRED}),
    "arcee_fusion": Method(arcee_fusion, "yes", (1, 1)),
    "ram": Method(ram, "yes", (1, None), {}, {"epsilon": 1e-5}),
    "ramplus_tl": Method(ramplus_tl, "yes", (1, None), {}, {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}),
    "passthrough": Method(passthrough, "no", (1, 1), {"scale": 1.0}),
}


def _sum(tensors: list[Tensor], weights: list[float]) -> Tensor:
    """Σ w x, in a new tensor."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:]):
        total.add_(tensor, alpha=weight)
    return total


def _stock_ratio(products: Tensor, n: int) -> Tensor:
    """t of model_stock from the inner products of the δ, [..., N, N]."""
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = torch.where(norms > 0, 1 / norms, 0.0)
    cosines = products * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    pairs = cosines.triu(1).sum((-2, -1)) / (n * (n - 1) / 2)
    return n * pairs / (1 + (n - 1) * pairs)


def _importance(block: Block) -> Tensor:
    """|δ| · KL(p ‖ q), p and q the softmax of the rows of W and B, fp32 [R, C].

    In float64 and with δ centred to mean 0 under q, so that nothing cancels: with Z = Σ q e^δ,
    KL = Σ q (e^δ - 1) δ / Z - log Z, both terms of the order of δ².
    """
    delta = block.delta(0)
    base = block.origin.double()
    q = base.softmax(1)
    centred = block.models[0].double() - base
    centred -= (q * centred).sum(1, keepdim=True)
    grown = centred.expm1()
    excess = (q * grown).sum(1, keepdim=True)
    divergence = (q * grown * centred).sum(1, keepdim=True) / (1 + excess) - excess.log1p()
    return (delta.abs() * divergence.clamp_min(0)).float()


def _changed(block: Block, epsilon: float) -> list[Tensor]:
    return [delta.abs() > epsilon for delta in block.deltas()]


def _ram(epsilon: float, scale: list[float]) -> Combine:
    def combine(block: Block) -> Tensor:
        changed = _changed(block, epsilon)
        count = torch.stack(changed).sum(0)
        alone = count == 1
        total = torch.zeros_like(block.origin)
        for delta, mask, factor in zip(block.deltas(), changed, scale):
            total.add_(delta * mask * torch.where(alone, factor, 1.0))
        return total.div_(count.clamp_min(1)).add_(block.origin)

    return combine
