"""The LM head and its loss: one Triton kernel per chunk between matrix products of cuBLAS.

The kernel turns logits into their gradient in place, one program per token. A row of 200,192 logits does not fit into a
multiprocessor, so the row is read twice:

    1. the largest logit and Σ exp(logit − largest so far), each kept per GROUP of neighbouring logits held by one
       thread: one exponential per logit, one more per group when its largest grows, no exchange between threads
    2. from the end of the row to its beginning, because the L2 cache still holds the end:
       w·(p·(1 + 2·z·lse) − onehot), w the token's weight, written over the logits

Without a gradient the second pass is skipped.
Saved for backward: dX, and dW in fp32, as in the reference.

Shapes: T tokens, D width, V vocabulary, C tokens of one chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trinity_kernels.cross_entropy import IGNORE, forward_in_chunks, required_gradients, scaled_gradients
from trinity_kernels.custom_op import custom_op
from trinity_kernels.language import tl, triton


class Tile(NamedTuple):
    """Logits per step of a program, and warps of a program."""

    block: int
    warps: int


def tile(vocabulary: int, itemsize: int) -> Tile:
    """Tile for rows of V logits: each thread has four loads of 16 bytes in flight.

    A long row occupies a whole multiprocessor: 1024 threads of 33 to 64 registers. The fewer rows are processed at a
    time, the more of each row is still in the L2 cache at the second reading. Rows that are not all aligned to 16 bytes
    are read one logit at a time; the addresses of four loads would not fit into registers, so there are half as many.
    """
    warps = 4 if vocabulary <= 4096 else 8 if vocabulary <= 65536 else 32
    bytes_a_thread = 64 if vocabulary % 16 == 0 else 32
    return Tile(32 * warps * bytes_a_thread // itemsize, warps)


def logits_to_gradient(
    logits_CV: Tensor, targets_C: Tensor, z: float, ce_C: Tensor, lse_C: Tensor, top_C: Tensor, with_gradient: bool,
    weights_C: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One chunk; see trinity_kernels.cross_entropy.ChunkLoss.

    Args:
        logits_CV: [C, V] contiguous, fp32, fp16 or bf16; overwritten by the gradient.
        targets_C: [C] int64. A target that is neither in [0, V) nor IGNORE gives a loss of NaN.
        ce_C, lse_C, top_C: [C] fp32 contiguous, written.
        weights_C: [C] fp32 contiguous, multiplied into the gradient; None: 1.
    Returns:
        logits_CV itself.
    """
    C, V = logits_CV.shape
    block, warps = tile(V, logits_CV.element_size())
    losses_and_gradient[(C,)](
        logits_CV, targets_C.contiguous(), weights_C, ce_C, lse_C, top_C, V, z, IGNORE=IGNORE, GRADIENT=with_gradient,
        WEIGHTED=weights_C is not None, BLOCK_V=block, GROUP=16 // logits_CV.element_size(), num_warps=warps,
    )  # fmt: skip
    return logits_CV


@triton.jit
def losses_and_gradient(
    logits, targets, weights, ce, lse, top, V, z,
    IGNORE: tl.constexpr, GRADIENT: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One token: its CE, lse and largest logit; with GRADIENT, overwrite its logits with their gradient."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * V
    target = tl.load(targets + token)
    # read before the gradient is written: the reductions over the row keep any thread from writing before all have read
    picked = tl.load(row + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    groups: tl.constexpr = BLOCK_V // GROUP
    columns = tl.arange(0, groups)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]

    # the smallest fp32 number, not −∞, because −∞ − (−∞) is NaN
    group_top = tl.full([groups], -3.4028234663852886e38, tl.float32)
    group_sum = tl.zeros([groups], tl.float32)
    for start in range(0, V, BLOCK_V):
        at = start + columns
        x = tl.load(row + at, mask=at < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(group_top, tl.max(x, axis=1))
        group_sum = group_sum * tl.exp(group_top - higher) + tl.sum(tl.exp(x - higher[:, None]), axis=1)
        group_top = higher
    largest = tl.max(group_top, axis=0)
    total = tl.sum(group_sum * tl.exp(group_top - largest), axis=0)

    valid = target != IGNORE
    log_sum = largest + tl.log(total)
    # largest − picked first: added to a large logit, the logarithm would lose its digits
    tl.store(ce + token, tl.where(valid, largest - picked + tl.log(total), 0.0))
    tl.store(lse + token, tl.where(valid, log_sum, 0.0))
    # tl.max ignores NaN, the sum does not, so a NaN sum marks a NaN logit, unless the largest logit is infinite
    tl.store(top + token, tl.where((total != total) & (largest < float("inf")), total, largest))

    if GRADIENT:
        scale = (1.0 + 2.0 * z * log_sum) / total
        one = 1.0
        if WEIGHTED:
            one = tl.load(weights + token)
            scale *= one
        for back in range(0, V, BLOCK_V):
            at = (tl.cdiv(V, BLOCK_V) - 1) * BLOCK_V - back + columns
            x = tl.load(row + at, mask=at < V, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
            gradient = tl.exp(x - largest) * scale - tl.where(at == target, one, 0.0)
            tl.store(row + at, tl.where(valid, gradient, 0.0).to(logits.dtype.element_ty), mask=at < V)


@custom_op("trinity::linear_cross_entropy")
def _forward(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z: float,
    for_x: bool, for_weight: bool, grad_weight_dtype: torch.dtype, weights_T: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    itemsize = x_TD.element_size()
    return forward_in_chunks(
        x_TD, weight_VD, targets_T, z, for_x, for_weight, logits_to_gradient, itemsize, weights_T
    )  # fmt: skip


@_forward.register_fake
def _(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z: float,
    for_x: bool, for_weight: bool, grad_weight_dtype: torch.dtype, weights_T: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    total = x_TD.new_empty((), dtype=torch.float32)
    ce_T, lse_T, top_T = (x_TD.new_empty(targets_T.shape, dtype=torch.float32) for _ in range(3))
    grad_weight = weight_VD.new_empty(weight_VD.shape if for_weight else 0, dtype=torch.float32)
    return total, ce_T, lse_T, top_T, x_TD.new_empty(x_TD.shape if for_x else 0), grad_weight


def _save(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[4:])
    ctx.grad_weight_dtype = inputs[6]
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return *scaled_gradients(ctx, grad), None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z: float = 0.0, grad_weight_dtype: torch.dtype | None = None,
    weights_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See trinity_kernels.linear_cross_entropy; in fp32, fp16 or bf16."""
    gradients = required_gradients(x_TD, weight_VD, grad_weight_dtype)
    return _forward(x_TD, weight_VD, targets_T, z, *gradients, weights_T)[:4]
