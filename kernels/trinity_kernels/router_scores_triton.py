"""The router's scores in Triton and cuBLAS: three bf16 products in place of one in fp32 (router_scores.py).

forward    `split_kernel` writes the weight's parts; `scores_kernel` reads each tile of x once, multiplies it by the
           three parts, sums hi in one accumulator and mid and lo, 2⁸ times smaller, in a second, and applies σ
backward   `split_kernel` makes g = ds·s·(1 − s) and its parts; dx and dW are one product each, by torch

Parts are kept in four blocks, so that both products of backward are products of slices, without a copy:

    the weight's  [4·E, D]   rows      hi hi mid lo     dx uses the first three, forward the last three
    g's           [T, 4·E]   columns   lo mid hi hi     dx uses the last three, dW the first three

dx = mid·hi + hi·hi + hi·mid is then one product of depth 3·E. dW comes from one product as three summands [3, E, D].

Saved for backward: x in bf16, the weight's parts (8·E·D bytes), s.

Shapes: T tokens, D width, E experts.
"""

import torch
from torch import Tensor

from trinity_kernels.custom_op import custom_op
from trinity_kernels.language import cdiv, next_power_of_2, tl, triton

BLOCK = 1024
"""Numbers per program of `split_kernel`."""


def tile(experts: int) -> dict[str, int]:
    """Tile of `scores_kernel` and its warps and stages; two accumulators of 128 × 128 take half the registers."""
    block = min(128, max(16, next_power_of_2(experts)))
    return {"BLOCK_T": 128, "BLOCK_E": block, "BLOCK_K": 64, "num_warps": 8 if block > 64 else 4, "num_stages": 3}


def launch_split(values_ND: Tensor, scores: Tensor | None = None) -> Tensor:
    """Parts hi, hi, mid, lo of a weight [N, D] as [4·N, D]; with scores, lo, mid, hi, hi of g [T, E] as [T, 4·E].

    Args:
        values_ND: fp32, contiguous: the weight, or the gradient ds of the scores.
        scores: fp32, contiguous, same shape: g = ds·s·(1 − s) is split.
    """
    N, D = values_ND.shape
    shape = (4 * N, D) if scores is None else (N, 4 * D)
    parts = values_ND.new_empty(shape, dtype=torch.bfloat16)
    if parts.numel():
        split_kernel[(cdiv(N * D, BLOCK),)](
            values_ND, scores, parts, N * D, D, SIGMOID=scores is not None, BLOCK=BLOCK, num_warps=4
        )
    return parts


def launch_scores(x_TD: Tensor, parts: Tensor, block: dict[str, int] | None = None) -> Tensor:
    """σ(x·Wᵀ) [T, E] in fp32 from the weight's parts [4·E, D].

    Args:
        block: the tile; that of `tile` by default.
    """
    (T, D), E = x_TD.shape, len(parts) // 4
    scores_TE = x_TD.new_empty(T, E, dtype=torch.float32)
    if scores_TE.numel():
        block = block or tile(E)
        grid = cdiv(T, block["BLOCK_T"]), cdiv(E, block["BLOCK_E"])
        scores_kernel[grid](x_TD, parts, scores_TE, T, E, D, E * D, **block)
    return scores_TE


@custom_op("trinity::router_scores_triton")
def _router_scores(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    parts = launch_split(weight_ED.contiguous())
    return launch_scores(x_TD.contiguous(), parts), parts


@_router_scores.register_fake
def _(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    (T, D), E = x_TD.shape, weight_ED.shape[0]
    return x_TD.new_empty((T, E), dtype=torch.float32), x_TD.new_empty((4 * E, D))


@custom_op("trinity::router_scores_triton_backward")
def _backward(
    grad_TE: Tensor, scores_TE: Tensor, x_TD: Tensor, parts: Tensor, for_x: bool, for_weight: bool
) -> tuple[Tensor, Tensor]:
    """dx [T, D] bf16 and dW [E, D] fp32; without elements where not wanted."""
    E = scores_TE.shape[1]
    grad_parts = launch_split(grad_TE.contiguous(), scores_TE)
    grad_x = grad_parts[:, E:] @ parts[: 3 * E] if for_x else x_TD.new_empty(0)
    if not for_weight:
        return grad_x, scores_TE.new_empty(0)
    products = _product_in_fp32(grad_parts[:, : 3 * E].t(), x_TD)
    return grad_x, products.view(3, E, -1).sum(dim=0)


@_backward.register_fake
def _(
    grad_TE: Tensor, scores_TE: Tensor, x_TD: Tensor, parts: Tensor, for_x: bool, for_weight: bool
) -> tuple[Tensor, Tensor]:
    shape = (scores_TE.shape[1], x_TD.shape[1]) if for_weight else (0,)
    return x_TD.new_empty(x_TD.shape if for_x else (0,)), scores_TE.new_empty(shape)


def _product_in_fp32(left: Tensor, right: Tensor) -> Tensor:
    """left·right of bf16 matrices, not rounded: on CUDA by tensor cores, which torch offers there alone."""
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _save(ctx, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    scores_TE, parts = output
    ctx.save_for_backward(scores_TE, inputs[0], parts)
    ctx.mark_non_differentiable(parts)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_TE: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None]:
    if grad_TE is None:
        return None, None
    for_x, for_weight = ctx.needs_input_grad[:2]
    grad_x, grad_weight = _backward(grad_TE, *ctx.saved_tensors, for_x, for_weight)
    return grad_x if for_x else None, grad_weight if for_weight else None


_router_scores.register_autograd(_differentiate, setup_context=_save)


def router_scores(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """See trinity_kernels.router_scores."""
    return _router_scores(x_TD, weight_ED.float())[0]


@triton.jit
def split_kernel(values, scores, parts, size, D, SIGMOID: tl.constexpr, BLOCK: tl.constexpr):
    """The three bf16 parts of BLOCK numbers of `size` in rows of D; with SIGMOID those of values·s·(1 − s)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    value = tl.load(values + place, mask=inside, other=0.0)
    if SIGMOID:
        s = tl.load(scores + place, mask=inside, other=0.0)
        value = value * (s * (1.0 - s))
    high = value.to(tl.bfloat16)
    # an infinite or NaN number has no rest
    rest = tl.where(tl.abs(high.to(tl.float32)) < float("inf"), value - high.to(tl.float32), 0.0)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    if SIGMOID:  # columns lo mid hi hi
        out = parts + place + (place // D) * (3 * D)
        tl.store(out, low, mask=inside)
        tl.store(out + D, middle, mask=inside)
        tl.store(out + 2 * D, high, mask=inside)
        tl.store(out + 3 * D, high, mask=inside)
    else:  # rows hi hi mid lo
        out = parts + place
        tl.store(out, high, mask=inside)
        tl.store(out + size, high, mask=inside)
        tl.store(out + 2 * size, middle, mask=inside)
        tl.store(out + 3 * size, low, mask=inside)


@triton.jit
def scores_kernel(
    x, parts, scores, T, E, D, size, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Scores of BLOCK_T tokens for BLOCK_E experts."""
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    rows = x + token[:, None] * D
    high_rows = parts + size + expert[None, :].to(tl.int64) * D
    large = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    small = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for first in range(0, D, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        left = tl.load(rows + column[None, :], mask=(token < T)[:, None] & (column < D)[None, :], other=0.0)
        inside = (column < D)[:, None] & (expert < E)[None, :]
        right = high_rows + column[:, None]
        small = tl.dot(left, tl.load(right + 2 * size, mask=inside, other=0.0), small)
        small = tl.dot(left, tl.load(right + size, mask=inside, other=0.0), small)
        large = tl.dot(left, tl.load(right, mask=inside, other=0.0), large)
    logit = large + small
    score = 1.0 / (1.0 + tl.exp(-logit))
    place = token[:, None] * E + expert[None, :]
    tl.store(scores + place, score, mask=(token < T)[:, None] & (expert < E)[None, :])
