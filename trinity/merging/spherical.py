"""Merging along great circles: slerp, nuslerp, multislerp, and the Riemannian mean (karcher).

Every result lies in the span of the inputs. So a pass over the blocks gives the matrix of inner products, in float64;
the coefficients follow from it, and the second pass is a weighted sum. Rows or columns have coefficients of their own
in nuslerp.

Symbols: U_i = W_i / ‖W_i‖, θ the angle between two inputs, K the inner products of the U_i.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trinity.errors import UserError
from trinity.merging.inputs import Block, Combine, Inputs

_COLLINEAR = 0.9995
"""slerp interpolates linearly above this |cos θ|."""


def slerp(inputs: Inputs, t: float) -> Combine:
    """sin((1-t)θ)/sin θ · B + sin(tθ)/sin θ · W; linear in t where |cos θ| > 0.9995 or an input is 0."""
    products = _products(inputs, lambda block: [block.origin, *block.models])
    norms = products.diagonal().sqrt()
    cosine = float(products[0, 1] / (norms[0] * norms[1])) if bool((norms > 0).all()) else 1.0
    if abs(cosine) > _COLLINEAR:
        first, second = 1 - t, t
    else:
        first, second = (float(each) for each in _arc(torch.tensor(cosine, dtype=torch.float64), t))
    return lambda block: (block.origin * first).add_(block.models[0], alpha=second)


def nuslerp(inputs: Inputs, weight: list[float], nuslerp_flatten: bool, nuslerp_row_wise: bool) -> Combine:
    """slerp from W_1 to W_2 with t = w_2/(w_1 + w_2); with a base, of the differences, which are added to it.

    The angle is that of the whole tensor, or, without nuslerp_flatten, of each row W[i, :], or with nuslerp_row_wise of
    each column W[:, j], which is what this parameter means in mergekit. Linear in t only where inputs are collinear.
    """
    t = weight[1] / (weight[0] + weight[1])
    dims = (0, 1) if nuslerp_flatten or inputs.rows == 1 else (0,) if nuslerp_row_wise else (1,)
    by_row = dims == (1,)
    sums = None if by_row else _pair_sums(inputs, dims)

    def combine(block: Block) -> Tensor:
        first, second = _vectors(block)
        to_first, to_second = _pair_coefficients(_pair(first, second, dims) if sums is None else sums, t)
        return _on_base(block, first * to_first.float() + second * to_second.float())

    return combine


def multislerp(inputs: Inputs, weight: list[float], normalize_weights: bool, eps: float) -> Combine:
    """Barycenter of directions: one step on the sphere from the mean direction, times the mean norm.

    μ = Σ w U / ‖Σ w U‖, T = Σ w (U - ⟨U, μ⟩ μ), (μ cos ‖T‖ + T sin ‖T‖ / ‖T‖) · Σ w ‖W‖. With a base, of the
    differences, which are added to it.
    """
    norms, units = _unit_products(_products(inputs, _vectors))
    w = torch.tensor(weight, dtype=torch.float64)
    if normalize_weights:
        w = w / w.sum()
    length = (w @ units @ w).clamp_min(0).sqrt()
    if length <= eps:
        if bool((norms > eps).any()):
            raise UserError("multislerp has no mean direction, as the weighted directions cancel; use other weights")
        return lambda block: _on_base(block, torch.zeros_like(block.models[0]))
    mean = w / length
    step = w - mean * (w @ units @ mean)
    angle = (step @ units @ step).clamp_min(0).sqrt()
    direction = mean * angle.cos() + (step * (angle.sin() / angle) if angle > eps else 0)
    return _weighted(direction * (w @ norms), norms)


def karcher(inputs: Inputs, max_iter: int, tol: float) -> Combine:
    """Riemannian (Karcher) mean of the directions, times the mean norm; the inputs have equal weights.

    From the normalised mean of the U_i, u moves by T = mean of θ_i/sin θ_i · (U_i - cos θ_i u) along the great circle,
    u cos ‖T‖ + T sin ‖T‖/‖T‖, until ‖T‖ < tol or max_iter steps are done.
    """
    norms, units = _unit_products(_products(inputs, _vectors))
    share = (norms > 0).double()
    share = share / share.sum().clamp_min(1)
    length = (share @ units @ share).clamp_min(0).sqrt()
    if length == 0:
        return _weighted(torch.zeros_like(norms), norms)
    mean = share / length
    for _ in range(max_iter):
        cosines = (units @ mean).clamp(-1, 1)
        angles = cosines.arccos()
        stretch = share * torch.where(angles > 0, angles / angles.sin().clamp_min(1e-300), 1.0)
        step = stretch - mean * (stretch @ cosines)
        size = (step @ units @ step).clamp_min(0).sqrt()
        if size < tol:
            break
        mean = mean * size.cos() + step * (size.sin() / size)
        mean = mean / (mean @ units @ mean).sqrt()
    return _weighted(mean * norms.mean(), norms)


def inner_products(tensors: list[Tensor]) -> Tensor:
    """Matrix of the inner products of tensors of one shape, in float64."""
    flat = torch.stack([tensor.reshape(-1) for tensor in tensors]).double()
    return flat @ flat.T


def _products(inputs: Inputs, vectors: Callable[[Block], list[Tensor]]) -> Tensor:
    total: Tensor | None = None
    for block in inputs:
        part = inner_products(vectors(block))
        total = part if total is None else total + part
    assert total is not None
    return total


def _vectors(block: Block) -> list[Tensor]:
    """What the angle is between: the differences from the base, or the tensors without one."""
    return block.models if block.base is None else block.deltas()


def _on_base(block: Block, result: Tensor) -> Tensor:
    return result if block.base is None else result.add_(block.base)


def _unit_products(products: Tensor) -> tuple[Tensor, Tensor]:
    """(norms, K); a tensor that is 0 has inner products 0 with all."""
    norms = products.diagonal().sqrt()
    scale = torch.where(norms > 0, 1 / norms, 0.0)
    return norms, products * scale[:, None] * scale


def _weighted(directions: Tensor, norms: Tensor) -> Combine:
    """Σ c_i U_i, added to the base if there is one."""
    weights = torch.where(norms > 0, directions / norms, 0.0).tolist()

    def combine(block: Block) -> Tensor:
        total = torch.zeros_like(block.models[0])
        for vector, each in zip(_vectors(block), weights):
            total.add_(vector, alpha=each)
        return _on_base(block, total)

    return combine


def _arc(cosine: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Coefficients of slerp for angles given by their cosines; linear where the inputs are collinear."""
    angle = cosine.clamp(-1, 1).arccos()
    sine = angle.sin()
    straight = sine < 1e-8  # the inputs are collinear as far as float64 inner products of fp32 numbers can tell
    safe = torch.where(straight, 1.0, sine)
    first = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / safe)
    return first, torch.where(straight, t, (t * angle).sin() / safe)


def _pair(first: Tensor, second: Tensor, dims: tuple[int, ...]) -> Tensor:
    """⟨1, 1⟩, ⟨2, 2⟩ and ⟨1, 2⟩ over the dimensions, stacked."""
    a, b = first.double(), second.double()
    return torch.stack([(x * y).sum(dims, keepdim=True) for x, y in ((a, a), (b, b), (a, b))])


def _pair_sums(inputs: Inputs, dims: tuple[int, ...]) -> Tensor:
    parts = (_pair(first, second, dims) for first, second in map(_vectors, inputs))
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def _pair_coefficients(sums: Tensor, t: float) -> tuple[Tensor, Tensor]:
    norms = (sums[0] * sums[1]).sqrt()
    return _arc(torch.where(norms > 0, sums[2] / norms.clamp_min(1e-300), 1.0), t)
