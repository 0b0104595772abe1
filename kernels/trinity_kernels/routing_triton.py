"""Routing in Triton: top K of each token's biased scores, the counts per expert, and the gates of the chosen.

The choice is K rounds of taking the largest remaining score, the first of equal ones. NaN counts as the smallest, so
that a broken router still names K different experts. Counts are summed by integer atomics, whose order has no effect.

Gates: g_k = c·s_k/Σ, where Σ is the sum of the chosen scores plus 1e-20; so ds_k = c·(dg_k − (Σ_j dg_j·s_j)/Σ)/Σ.
Saved for backward: scores and indices.

Shapes: T tokens, E experts, K active experts.
"""

import torch
from torch import Tensor

from trinity_kernels.custom_op import custom_op
from trinity_kernels.language import cdiv, next_power_of_2, tl, triton
from trinity_kernels.routing import TINY

TOKENS = 16
"""Tokens per program."""


@custom_op("trinity::route_triton")
def route(scores_TE: Tensor, bias_E: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """See trinity_kernels.route."""
    return launch_route(scores_TE, bias_E, active)


def launch_route(scores_TE: Tensor, bias_E: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """Launch the kernel of `route`."""
    T, E = scores_TE.shape
    indices_TK = torch.empty(T, active, dtype=torch.int64, device=scores_TE.device)
    counts_E = torch.zeros(E, dtype=torch.int64, device=scores_TE.device)
    if T:
        route_kernel[(cdiv(T, TOKENS),)](
            scores_TE.contiguous(), bias_E, indices_TK, counts_E, T, E,
            ACTIVE=active, BLOCK_T=TOKENS, EXPERTS=next_power_of_2(E), num_warps=4,
        )  # fmt: skip
    return indices_TK, counts_E


@route.register_fake
def _(scores_TE: Tensor, bias_E: Tensor, active: int) -> tuple[Tensor, Tensor]:
    indices_TK = scores_TE.new_empty((scores_TE.shape[0], active), dtype=torch.int64)
    return indices_TK, scores_TE.new_empty((scores_TE.shape[1],), dtype=torch.int64)


@triton.jit
def route_kernel(
    scores, bias, indices, counts, T, E,
    ACTIVE: tl.constexpr, BLOCK_T: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Choices of BLOCK_T tokens, one round per choice."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, EXPERTS)
    there = token < T
    inside = there[:, None] & (expert < E)[None, :]
    biased = tl.load(scores + token.to(tl.int64)[:, None] * E + expert[None, :], mask=inside, other=0.0)
    biased += tl.load(bias + expert, mask=expert < E, other=0.0)[None, :]
    biased = tl.where(biased == biased, biased, float("-inf"))
    left = inside
    for k in range(ACTIVE):
        best = tl.max(tl.where(left, biased, float("-inf")), axis=1)
        candidates = left & (biased == best[:, None])
        chosen = tl.min(tl.where(candidates, expert[None, :], EXPERTS), axis=1)
        left = left & (expert[None, :] != chosen[:, None])
        tl.store(indices + token.to(tl.int64) * ACTIVE + k, chosen.to(tl.int64), mask=there)
    taken = tl.sum((inside & (left == 0)).to(tl.int32), axis=0)
    tl.atomic_add(counts + expert, taken.to(tl.int64), mask=(expert < E) & (taken > 0), sem="relaxed")


@custom_op("trinity::gates_triton")
def _gates(scores_TE: Tensor, indices_TK: Tensor, scale: float) -> Tensor:
    return launch_gates(scores_TE, indices_TK, scale)


def launch_gates(scores_TE: Tensor, indices_TK: Tensor, scale: float, grad_TK: Tensor | None = None) -> Tensor:
    """The gates [T, K]; with grad_TK, the gradient of the scores [T, E], 0 for experts that are not chosen."""
    (T, E), active = scores_TE.shape, indices_TK.shape[1]
    out = torch.empty(T, active if grad_TK is None else E, dtype=scores_TE.dtype, device=scores_TE.device)
    if T:
        gates_kernel[(cdiv(T, TOKENS),)](
            scores_TE.contiguous(), indices_TK.contiguous(), out if grad_TK is None else grad_TK, out,
            T, E, scale, TINY,
            ACTIVE=active, BACKWARD=grad_TK is not None,
            BLOCK_T=TOKENS, CHOICES=next_power_of_2(active), EXPERTS=next_power_of_2(E), num_warps=4,
        )  # fmt: skip
    return out


@_gates.register_fake
def _(scores_TE: Tensor, indices_TK: Tensor, scale: float) -> Tensor:
    return scores_TE.new_empty(indices_TK.shape)


@custom_op("trinity::gates_triton_backward")
def _gates_backward(grad_TK: Tensor, scores_TE: Tensor, indices_TK: Tensor, scale: float) -> Tensor:
    return launch_gates(scores_TE, indices_TK, scale, grad_TK.contiguous())


@_gates_backward.register_fake
def _(grad_TK: Tensor, scores_TE: Tensor, indices_TK: Tensor, scale: float) -> Tensor:
    return scores_TE.new_empty(scores_TE.shape)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.scale = inputs[2]


def _differentiate(ctx, grad_TK: Tensor) -> tuple[Tensor, None, None]:
    return _gates_backward(grad_TK, *ctx.saved_tensors, ctx.scale), None, None


_gates.register_autograd(_differentiate, setup_context=_save)


def gates(scores_TE: Tensor, indices_TK: Tensor, scale: float) -> Tensor:
    """See trinity_kernels.gates."""
    return _gates(scores_TE, indices_TK, scale)


@triton.jit
def gates_kernel(
    scores, indices, grad, out, T, E, scale, tiny,
    ACTIVE: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_T: tl.constexpr, CHOICES: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Gates of BLOCK_T tokens; with BACKWARD, the gradient of their scores."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    choice = tl.arange(0, CHOICES)
    there = token < T
    inside = there[:, None] & (choice < ACTIVE)[None, :]
    place = token.to(tl.int64)[:, None] * ACTIVE + choice[None, :]
    chosen = tl.load(indices + place, mask=inside, other=0)
    line = token.to(tl.int64)[:, None] * E
    score = tl.load(scores + line + chosen, mask=inside, other=0.0)
    total = tl.sum(score, axis=1)[:, None] + tiny
    if BACKWARD:
        q = tl.load(grad + place, mask=inside, other=0.0)
        ds = scale * (q - tl.sum(q * score, axis=1)[:, None] / total) / total
        expert = tl.arange(0, EXPERTS)
        result = tl.zeros((BLOCK_T, EXPERTS), tl.float32)
        for k in range(ACTIVE):
            this = (choice == k)[None, :]
            index = tl.sum(tl.where(this, chosen, 0), axis=1)
            value = tl.sum(tl.where(this, ds, 0.0), axis=1)
            result += tl.where(expert[None, :] == index[:, None], value[:, None], 0.0)
        tl.store(out + line + expert[None, :], result, mask=there[:, None] & (expert < E)[None, :])
    else:
        tl.store(out + place, score / total * scale, mask=inside)
