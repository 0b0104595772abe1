"""The LM head and its loss with one Triton kernel per chunk, between matrix products of cuBLAS.

The kernel turns logits into their gradient in place, one program a token. A row of 200,192 logits fits no
multiprocessor, so it is read twice:

    1. largest logit and Σ exp(logit − largest so far), each kept by GROUP neighbouring logits, which one thread holds:
       one exponential a logit, one more a group when its largest grows, nothing exchanged between threads
    2. from the end of the row to its beginning, since its end is what the L2 cache still holds:
       p·(1 + 2·z·lse) − onehot, written where the logits were

Without a gradient the second pass is left out.

Shapes: T tokens, D width, V vocabulary, C tokens of one chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trinity_kernels.cross_entropy import IGNORE, forward_in_chunks, scaled_gradients, wanted_gradients
from trinity_kernels.language import tl, triton


class Tile(NamedTuple):
    """How many logits one step of a program takes, and by how many warps."""

    block: int
    warps: int


def tile(vocabulary: int, itemsize: int) -> Tile:
    """For rows of V logits: each thread has four loads of 16 bytes under way.

    A long row has a multiprocessor of its own: 1024 threads of 33 to 64 registers. The fewer rows are under way, the
    more of each the L2 cache still holds when it is read again. Rows that do not all begin at 16 bytes are read one
    logit at a time, for which so many addresses find no room in registers: half as many then.
    """
    warps = 4 if vocabulary <= 4096 else 8 if vocabulary <= 65536 else 32
    bytes_a_thread = 64 if vocabulary % 16 == 0 else 32
    return Tile(32 * warps * bytes_a_thread // itemsize, warps)


def logits_to_gradient(
    logits_CV: Tensor, targets_C: Tensor, z: float, ce_C: Tensor, lse_C: Tensor, top_C: Tensor, with_gradient: bool
) -> Tensor:
    """One chunk; see trinity_kernels.cross_entropy.ChunkLoss.

    Args:
        logits_CV: [C, V] contiguous, fp32, fp16 or bf16; overwritten by the gradient.
        targets_C: [C] int64. One that is neither in [0, V) nor IGNORE gives a loss of NaN.
        ce_C, lse_C, top_C: [C] fp32 contiguous, written.
    Returns:
        The logits' memory.
    """
    C, V = logits_CV.shape
    block, warps = tile(V, logits_CV.element_size())
    losses_and_gradient[(C,)](
        logits_CV, targets_C.contiguous(), ce_C, lse_C, top_C, V, z, IGNORE=IGNORE, GRADIENT=with_gradient,
        BLOCK_V=block, GROUP=16 // logits_CV.element_size(), num_warps=warps,
    )  # fmt: skip
    return logits_CV


@triton.jit
def losses_and_gradient(
    logits, targets, ce, lse, top, V, z,
    IGNORE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One token: its CE, lse and largest logit, and the gradient in place of its logits."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * V
    target = tl.load(targets + token)
    # read before anything is written; the sums over the row let no thread write before all have read
    picked = tl.load(row + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    groups: tl.constexpr = BLOCK_V // GROUP
    columns = tl.arange(0, groups)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]

    # the least number of fp32 rather than −∞, whose difference from itself is NaN
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
    # largest − picked first: the logarithm would lose its digits in a large logit
    tl.store(ce + token, tl.where(valid, largest - picked + tl.log(total), 0.0))
    tl.store(lse + token, tl.where(valid, log_sum, 0.0))
    # a maximum passes over NaN, a sum does not; an infinite logit leaves NaN in the sum too, and is the largest
    tl.store(top + token, tl.where((total != total) & (largest < float("inf")), total, largest))

    if GRADIENT:
        scale = (1.0 + 2.0 * z * log_sum) / total
        for back in range(0, V, BLOCK_V):
            at = (tl.cdiv(V, BLOCK_V) - 1) * BLOCK_V - back + columns
            x = tl.load(row + at, mask=at < V, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
            gradient = tl.exp(x - largest) * scale - tl.where(at == target, 1.0, 0.0)
            tl.store(row + at, tl.where(valid, gradient, 0.0).to(logits.dtype.element_ty), mask=at < V)


@torch.library.custom_op("trinity::linear_cross_entropy", mutates_args=())
def _forward(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z: float,
    for_x: bool, for_weight: bool, grad_weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return forward_in_chunks(x_TD, weight_VD, targets_T, z, for_x, for_weight, logits_to_gradient, x_TD.element_size())


@_forward.register_fake
def _(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z: float,
    for_x: bool, for_weight: bool, grad_weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    total, *per_token = (x_TD.new_empty(shape, dtype=torch.float32) for shape in ((), *[targets_T.shape] * 3))
    grad_weight = weight_VD.new_empty(weight_VD.shape if for_weight else 0, dtype=torch.float32)
    return total, *per_token, x_TD.new_empty(x_TD.shape if for_x else 0), grad_weight


def _save(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[4:])
    ctx.grad_weight_dtype = inputs[-1]
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return *scaled_gradients(ctx, grad), None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z: float = 0.0, grad_weight_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As trinity_kernels.linear_cross_entropy, in fp32, fp16 or bf16."""
    gradients = wanted_gradients(x_TD, weight_VD, grad_weight_dtype)
    return _forward(x_TD, weight_VD, targets_T, z, *gradients)[:4]
