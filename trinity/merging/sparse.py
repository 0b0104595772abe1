"""Merging of sparsified differences δ_i = W_i - B: ties, dare, della, breadcrumbs, sce.

Each method first drops entries of every δ_i, by a cut or at random, and then adds up what is left:
B + λ Σ w_i δ_i, where sign consensus (TIES) drops, entry by entry, those that disagree with the sign of the sum.

TIES arXiv 2306.01708, DARE 2311.03099, DELLA 2406.11617, Model Breadcrumbs 2312.06795, SCE 2408.07990.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trinity.merging.inputs import Block, Combine, Inputs
from trinity.merging.selection import Cut, largest

_Keep = Callable[[Block, int, Tensor], Tensor]
"""keep(block, model, δ) is δ of a model with 0 where it is dropped."""


def ties(inputs: Inputs, weight: list[float], density: list[float], normalize: bool, lambda_: float) -> Combine:
    """Keep the max(1, int(d·n)) largest |δ_i|; then sign consensus, divided by Σ w over the agreeing entries."""
    cuts = [
        largest(inputs.magnitudes(model), max(1, int(share * inputs.count)), inputs.count)
        for model, share in enumerate(density)
    ]
    return _sum_of(_above(cuts), weight, normalize, lambda_, consensus=True)


def dare_linear(
    inputs: Inputs, weight: list[float], density: list[float], rescale: str, normalize: bool, lambda_: float
) -> Combine:
    """Keep each entry with probability `density` and rescale what is left (see `_rescaled`)."""
    keep = _rescaled(inputs, _bernoulli(density), rescale)
    return _sum_of(keep, weight, normalize, lambda_, consensus=False)


def dare_ties(
    inputs: Inputs, weight: list[float], density: list[float], rescale: str, normalize: bool, lambda_: float
) -> Combine:
    """dare_linear with sign consensus."""
    keep = _rescaled(inputs, _bernoulli(density), rescale)
    return _sum_of(keep, weight, normalize, lambda_, consensus=True)


def della_linear(
    inputs: Inputs,
    weight: list[float],
    density: list[float],
    epsilon: list[float],
    rescale: str,
    normalize: bool,
    lambda_: float,
) -> Combine:
    """Keep entries with probability density - ε + 2εr, r in [0, 1] the rank of |δ| in its row; rescale what is left."""
    keep = _rescaled(inputs, _by_rank(density, epsilon), rescale)
    return _sum_of(keep, weight, normalize, lambda_, consensus=False)


def della(
    inputs: Inputs,
    weight: list[float],
    density: list[float],
    epsilon: list[float],
    rescale: str,
    normalize: bool,
    lambda_: float,
) -> Combine:
    """della_linear with sign consensus."""
    keep = _rescaled(inputs, _by_rank(density, epsilon), rescale)
    return _sum_of(keep, weight, normalize, lambda_, consensus=True)


def breadcrumbs(
    inputs: Inputs, weight: list[float], density: list[float], gamma: list[float], normalize: bool, lambda_: float
) -> Combine:
    """Drop the int(γn) largest |δ_i|, and as many of the smallest that int(d·n) remain."""
    return _sum_of(_between(inputs, density, gamma), weight, normalize, lambda_, consensus=False)


def breadcrumbs_ties(
    inputs: Inputs, weight: list[float], density: list[float], gamma: list[float], normalize: bool, lambda_: float
) -> Combine:
    """breadcrumbs with sign consensus."""
    return _sum_of(_between(inputs, density, gamma), weight, normalize, lambda_, consensus=True)


def sce(inputs: Inputs, select_topk: float) -> Combine:
    """Keep the share of the varying entries whose δ vary most among models, w_i = mean(δ_i²)/Σ; then sign consensus.

    B + Σ mwδ/Σ mw, m the agreement with the sign of Σ δ.
    """
    varying = 0
    if select_topk < 1:
        varying = sum(int(torch.count_nonzero(_variance(block.deltas()))) for block in inputs)
    # where no entry varies the models agree, and nothing is dropped
    kept = max(1, int(select_topk * varying)) if varying else inputs.count
    cut = largest(lambda: ((block.first, _variance(block.deltas())) for block in inputs), kept, inputs.count)

    def deltas(block: Block) -> list[Tensor]:
        found = block.deltas()
        if kept < inputs.count:
            mask = cut.above(_variance(found), block.first)
            found = [delta.mul_(mask) for delta in found]
        return found

    energy = torch.zeros(inputs.models, dtype=torch.float64)
    for block in inputs:
        energy += torch.stack([delta.double().square_().sum() for delta in deltas(block)])
    weight = (energy / energy.sum() if energy.sum() > 0 else energy).tolist()

    def combine(block: Block) -> Tensor:
        found = deltas(block)
        positive = sum(found[1:], start=found[0]) >= 0
        return block.origin + _agreeing([delta * w for delta, w in zip(found, weight)], weight, positive, True)

    return combine


def _sum_of(keep: _Keep, weight: list[float], normalize: bool, lambda_: float, consensus: bool) -> Combine:
    """B + λ Σ w δ over what is kept; with `normalize` divided by Σ w, of the agreeing entries if there is consensus."""

    def combine(block: Block) -> Tensor:
        weighted = [keep(block, model, block.delta(model)).mul_(w) for model, w in enumerate(weight)]
        if consensus:
            positive = sum(weighted[1:], start=weighted[0]) >= 0
            total = _agreeing(weighted, weight, positive, normalize)
        else:
            total = sum(weighted[1:], start=weighted[0])
            if normalize:
                total = total / math.fsum(weight)
        return total.mul_(lambda_).add_(block.origin)

    return combine


def _agreeing(weighted: list[Tensor], weight: list[float], positive: Tensor, normalize: bool) -> Tensor:
    """Σ over the entries whose sign is the elected one (`positive`); entries that are 0 agree with none."""
    total, divisor = torch.zeros_like(weighted[0]), torch.zeros_like(weighted[0])
    for delta, w in zip(weighted, weight):
        agrees = torch.where(positive, delta > 0, delta < 0)
        total.add_(delta.mul(agrees))
        if normalize:
            divisor.add_(agrees, alpha=w)
    return total.div_(divisor.masked_fill_(divisor == 0, 1)) if normalize else total


def _above(cuts: list[Cut]) -> _Keep:
    return lambda block, model, delta: delta.mul_(cuts[model].above(delta.abs(), block.first))


def _between(inputs: Inputs, density: list[float], gamma: list[float]) -> _Keep:
    """Entries between two cuts by magnitude."""
    tops, ends = [], []
    for model, (share, top) in enumerate(zip(density, gamma)):
        kept = int(share * inputs.count)
        dropped = min(int(top * inputs.count), inputs.count - kept)
        tops.append(largest(inputs.magnitudes(model), dropped, inputs.count))
        ends.append(largest(inputs.magnitudes(model), dropped + kept, inputs.count))

    def keep(block: Block, model: int, delta: Tensor) -> Tensor:
        size = delta.abs()
        return delta.mul_(ends[model].above(size, block.first) & ~tops[model].above(size, block.first))

    return keep


_Chance = Callable[[int, Tensor], Tensor | float]
"""chance(model, δ) is the probability with which an entry is kept."""


def _bernoulli(density: list[float]) -> _Chance:
    return lambda model, delta: density[model]


def _by_rank(density: list[float], epsilon: list[float]) -> _Chance:
    def chance(model: int, delta: Tensor) -> Tensor | float:
        if density[model] >= 1:
            return 1.0
        order = delta.abs().sort(dim=1, stable=True).indices
        ranks = torch.linspace(0, 1, delta.shape[1]) if delta.shape[1] > 1 else torch.full((1,), 0.5)
        rank = torch.empty_like(delta).scatter_(1, order, ranks.expand_as(delta))
        return density[model] - epsilon[model] + 2 * epsilon[model] * rank

    return chance


def _rescaled(inputs: Inputs, chance: _Chance, rescale: str) -> _Keep:
    """Keep entries at random, and scale what is left.

    rescale: "l1" gives δ its L1 norm back, ‖δ‖₁/‖mδ‖₁ over the tensor; "density" divides by the probability with which
    the entry was kept, so that the expected value is δ (the papers' rule); "none".
    """

    def dropped(block: Block, model: int, delta: Tensor) -> Tensor:
        probability = chance(model, delta)
        if isinstance(probability, float) and probability >= 1:
            return delta
        mask = torch.rand(delta.shape, generator=block.generator(model)) < probability
        return delta.mul_(mask).div_(probability) if rescale == "density" else delta.mul_(mask)

    if rescale != "l1":
        return dropped
    before = torch.zeros(inputs.models, dtype=torch.float64)
    after = torch.zeros_like(before)
    for block in inputs:
        for model in range(inputs.models):
            delta = block.delta(model)
            before[model] += delta.abs().sum(dtype=torch.float64)
            after[model] += dropped(block, model, delta).abs().sum(dtype=torch.float64)
    scale = torch.where(after > 0, before / after, 1.0).tolist()
    return lambda block, model, delta: dropped(block, model, delta).mul_(scale[model])


def _variance(deltas: list[Tensor]) -> Tensor:
    """Variance of each entry among the models."""
    return torch.stack(deltas).var(0, unbiased=False)
