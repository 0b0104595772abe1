"""Routing in Triton: top K of each token's biased scores, the counts per expert; gates and statistics of the scores.

The choice is K rounds of taking the largest remaining score, the first of equal ones. NaN counts as the smallest, so
that a broken router still names K different experts. Counts are summed by integer atomics, whose order has no effect.

Gates: g_k = c·s_k/Σ, where Σ is the sum of the chosen scores plus 1e-20; so ds_k = c·(dg_k − (Σ_j dg_j·s_j)/Σ)/Σ.
Sequence-wise loss of a row, with p = s/Σs and f_i = E/(K·S) · (times i was chosen): L = Σ_i f_i · (Σ_t p_ti)/S; so
ds_ti = dL·(f_i − Σ_j f_j·p_tj)/(S·Σs_t). Both gradients are summed in one kernel.
Where S is not the number of a row's tokens here, because some are padding, or because the tokens are a part of their
rows and the counts of whole rows are given, S is Σ counts / K. The f that is saved is then multiplied by (tokens of the
row here)/S, so that the gradient, linear in f, divides by the number of tokens here in any case.
A program holds tokens of one row. It writes its sums of p, its counts and its entropy to places of its own, and a
second kernel adds those of a row: no float is added by an atomic.
Saved for backward: scores, indices, and f with the sequence-wise loss.

Shapes: T tokens, B rows of S tokens (T = B·S), E experts, K active experts, P programs.
"""

import torch
from torch import Tensor

from trinity_kernels.custom_op import custom_op
from trinity_kernels.language import cdiv, next_power_of_2, tl, triton
from trinity_kernels.routing import TINY, Weighed

TOKENS = 16
"""Tokens per program."""
PARTS = 16
"""Programs whose sums `finish_kernel` reads at a time."""


@custom_op("trinity::route_triton")
def route(
    scores_TE: Tensor, bias_E: Tensor, active: int, padding_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See trinity_kernels.route."""
    return launch_route(scores_TE, bias_E, active, padding_T)


def launch_route(
    scores_TE: Tensor, bias_E: Tensor, active: int, padding_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the kernel of `route`."""
    T, E = scores_TE.shape
    indices_TK = torch.empty(T, active, dtype=torch.int64, device=scores_TE.device)
    counts_E = torch.zeros(E, dtype=torch.int64, device=scores_TE.device)
    if T:
        route_kernel[(cdiv(T, TOKENS),)](
            scores_TE.contiguous(), bias_E, indices_TK, counts_E,
            None if padding_T is None else padding_T.contiguous().view(torch.uint8), T, E,
            ACTIVE=active, PADDED=padding_T is not None, BLOCK_T=TOKENS, EXPERTS=next_power_of_2(E), num_warps=4,
        )  # fmt: skip
    return indices_TK, counts_E


@route.register_fake
def _(scores_TE: Tensor, bias_E: Tensor, active: int, padding_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    indices_TK = scores_TE.new_empty((scores_TE.shape[0], active), dtype=torch.int64)
    return indices_TK, scores_TE.new_empty((scores_TE.shape[1],), dtype=torch.int64)


@triton.jit
def route_kernel(
    scores, bias, indices, counts, padding, T, E,
    ACTIVE: tl.constexpr, PADDED: tl.constexpr, BLOCK_T: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Choices of BLOCK_T tokens, one round per choice; with PADDED, −1 for the tokens that are padding."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, EXPERTS)
    there = token < T
    inside = there[:, None] & (expert < E)[None, :]
    biased = tl.load(scores + token.to(tl.int64)[:, None] * E + expert[None, :], mask=inside, other=0.0)
    biased += tl.load(bias + expert, mask=expert < E, other=0.0)[None, :]
    biased = tl.where(biased == biased, biased, float("-inf"))
    left = inside
    if PADDED:
        routed = tl.load(padding + token, mask=there, other=1) == 0
    for k in range(ACTIVE):
        best = tl.max(tl.where(left, biased, float("-inf")), axis=1)
        candidates = left & (biased == best[:, None])
        chosen = tl.min(tl.where(candidates, expert[None, :], EXPERTS), axis=1)
        left = left & (expert[None, :] != chosen[:, None])
        if PADDED:
            chosen = tl.where(routed, chosen, -1)
        tl.store(indices + token.to(tl.int64) * ACTIVE + k, chosen.to(tl.int64), mask=there)
    gone = inside & (left == 0)
    if PADDED:
        gone = gone & routed[:, None]
    taken = tl.sum(gone.to(tl.int32), axis=0)
    tl.atomic_add(counts + expert, taken.to(tl.int64), mask=(expert < E) & (taken > 0), sem="relaxed")


@custom_op("trinity::weigh_triton")
def _weigh(
    scores_TE: Tensor, indices_TK: Tensor, scale: float, rows: int, with_sequence_loss: bool, padded: bool,
    row_counts_BE: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return launch_weigh(scores_TE, indices_TK, scale, rows, with_sequence_loss, padded, row_counts_BE)


def launch_weigh(
    scores_TE: Tensor, indices_TK: Tensor, scale: float, rows: int, with_sequence_loss: bool, padded: bool = False,
    row_counts_BE: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gates [T, K]; loss [B] and f [B, E], without elements unless with_sequence_loss; the entropy's sum, a scalar."""
    (T, E), K = scores_TE.shape, indices_TK.shape[1]
    if not with_sequence_loss:
        rows = 1  # the entropy alone does not depend on rows
    gates_TK = scores_TE.new_empty(T, K)
    losses = rows if with_sequence_loss else 0
    loss_B, load_BE = scores_TE.new_empty(losses), scores_TE.new_empty(losses, E)
    if not T:
        return gates_TK, loss_B.zero_(), load_BE.zero_(), scores_TE.new_zeros(())
    if T % rows:
        raise ValueError(f"{T} tokens are not {rows} rows of the same length")
    tokens = T // rows
    block = TOKENS if E <= 256 else TOKENS // 2  # 512 experts take 253 registers with 16 tokens
    blocks = cdiv(tokens, block)
    entropy_P = scores_TE.new_empty(rows * blocks)
    share_PE = scores_TE.new_empty(rows * blocks if losses else 0, E)
    count_PE = torch.empty_like(share_PE, dtype=torch.int32)
    experts = next_power_of_2(E)
    weigh_kernel[(rows * blocks,)](
        scores_TE.contiguous(), indices_TK.contiguous(), gates_TK, entropy_P, share_PE, count_PE,
        tokens, E, blocks, scale, TINY,
        ACTIVE=K, BALANCE=with_sequence_loss, PADDED=padded,
        BLOCK_T=block, CHOICES=next_power_of_2(K), EXPERTS=experts, num_warps=4,
    )  # fmt: skip
    if losses:
        finish_kernel[(rows,)](
            share_PE, count_PE, None if row_counts_BE is None else row_counts_BE.contiguous(), loss_B, load_BE,
            E, blocks, E / (K * tokens), 1 / tokens, K * tokens, GIVEN=row_counts_BE is not None,
            STRETCHED=padded or row_counts_BE is not None, BLOCK_P=PARTS, EXPERTS=experts, num_warps=8,
        )  # fmt: skip
    return gates_TK, loss_B, load_BE, entropy_P.sum()


@_weigh.register_fake
def _(
    scores_TE: Tensor, indices_TK: Tensor, scale: float, rows: int, with_sequence_loss: bool, padded: bool,
    row_counts_BE: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    losses = rows if with_sequence_loss else 0
    shapes = (indices_TK.shape, (losses,), (losses, scores_TE.shape[1]), ())
    gates_TK, loss_B, load_BE, entropy_sum = (scores_TE.new_empty(shape) for shape in shapes)
    return gates_TK, loss_B, load_BE, entropy_sum


@custom_op("trinity::weigh_triton_backward")
def _weigh_backward(
    grad_TK: Tensor | None, grad_B: Tensor | None, scores_TE: Tensor, indices_TK: Tensor, load_BE: Tensor, scale: float,
    padded: bool,
) -> Tensor:  # fmt: skip
    return launch_weigh_backward(grad_TK, grad_B, scores_TE, indices_TK, load_BE, scale, padded)


def launch_weigh_backward(
    grad_TK: Tensor | None, grad_B: Tensor | None, scores_TE: Tensor, indices_TK: Tensor, load_BE: Tensor, scale: float,
    padded: bool = False,
) -> Tensor:  # fmt: skip
    """Gradient of the scores [T, E] from those of the gates and of the losses; either may be None, not both."""
    (T, E), K = scores_TE.shape, indices_TK.shape[1]
    grad_TE = scores_TE.new_empty(T, E)
    if T:
        rows = 1 if grad_B is None else len(grad_B)
        blocks = cdiv(T // rows, TOKENS)
        weigh_backward_kernel[(rows * blocks,)](
            None if grad_TK is None else grad_TK.contiguous(), None if grad_B is None else grad_B.contiguous(),
            scores_TE.contiguous(), indices_TK.contiguous(), load_BE, grad_TE, T // rows, E, blocks, scale, TINY,
            ACTIVE=K, GATES=grad_TK is not None, BALANCE=grad_B is not None, PADDED=padded,
            BLOCK_T=TOKENS, CHOICES=next_power_of_2(K), EXPERTS=next_power_of_2(E), num_warps=4,
        )  # fmt: skip
    return grad_TE


@_weigh_backward.register_fake
def _(
    grad_TK: Tensor | None, grad_B: Tensor | None, scores_TE: Tensor, indices_TK: Tensor, load_BE: Tensor, scale: float,
    padded: bool,
) -> Tensor:  # fmt: skip
    return scores_TE.new_empty(scores_TE.shape)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    scores_TE, indices_TK, ctx.scale, _, ctx.with_sequence_loss, ctx.padded, _ = inputs
    _, _, load_BE, entropy_sum = output
    ctx.save_for_backward(scores_TE, indices_TK, load_BE)
    ctx.mark_non_differentiable(load_BE, entropy_sum)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_TK: Tensor | None, grad_B: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grad_B = grad_B if ctx.with_sequence_loss else None
    if grad_TK is None and grad_B is None:
        return (None,) * 6
    return _weigh_backward(grad_TK, grad_B, *ctx.saved_tensors, ctx.scale, ctx.padded), *(None,) * 6


_weigh.register_autograd(_differentiate, setup_context=_save)


def weigh(
    scores_TE: Tensor, indices_TK: Tensor, scale: float, rows: int = 1, with_sequence_loss: bool = False,
    padded: bool = False, row_counts_BE: Tensor | None = None,
) -> Weighed:  # fmt: skip
    """See trinity_kernels.weigh."""
    gates_TK, loss_B, _, entropy_sum = _weigh(
        scores_TE, indices_TK, scale, rows, with_sequence_loss, padded, row_counts_BE
    )
    return Weighed(gates_TK, loss_B if with_sequence_loss else None, entropy_sum)


@triton.jit
def weigh_kernel(
    scores, indices, gates, entropies, shares, counts, S, E, blocks, scale, tiny,
    ACTIVE: tl.constexpr, BALANCE: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr, CHOICES: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Gates and entropy of up to BLOCK_T tokens of one row; with BALANCE, their sums of p and their counts.

    With PADDED, a token whose choices are −1 has gates of 0 and enters no sum.
    """
    program = tl.program_id(0)
    within = (program % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = within < S
    token = (program // blocks).to(tl.int64) * S + within
    expert = tl.arange(0, EXPERTS)
    choice = tl.arange(0, CHOICES)
    inside = there[:, None] & (choice < ACTIVE)[None, :]
    place = token[:, None] * ACTIVE + choice[None, :]
    chosen = tl.load(indices + place, mask=inside, other=0)
    if PADDED:
        there = there & (tl.min(chosen, axis=1) >= 0)
        score = tl.load(scores + token[:, None] * E + chosen, mask=inside & there[:, None], other=0.0)
    else:
        score = tl.load(scores + token[:, None] * E + chosen, mask=inside, other=0.0)
    total = tl.sum(score, axis=1)[:, None] + tiny
    tl.store(gates + place, score / total * scale, mask=inside)

    known = there[:, None] & (expert < E)[None, :]
    share = tl.load(scores + token[:, None] * E + expert[None, :], mask=known, other=0.0)
    share = share / tl.where(there, tl.sum(share, axis=1), 1.0)[:, None]
    logarithm = tl.log(tl.where(share == 0.0, 1.0, share))  # 0·log 0 is 0 here
    tl.store(entropies + program, -tl.sum(tl.sum(share * logarithm, axis=1), axis=0))
    if BALANCE:
        times = tl.zeros((BLOCK_T, EXPERTS), tl.int32)
        for k in range(ACTIVE):
            index = tl.sum(tl.where((choice == k)[None, :], chosen, 0), axis=1)
            times += ((expert[None, :] == index[:, None]) & there[:, None]).to(tl.int32)
        line = program.to(tl.int64) * E + expert
        tl.store(shares + line, tl.sum(share, axis=0), mask=expert < E)
        tl.store(counts + line, tl.sum(times, axis=0), mask=expert < E)


@triton.jit
def finish_kernel(
    shares, counts, row_counts, losses, loads, E, blocks, count_scale, share_scale, choices,
    GIVEN: tl.constexpr, STRETCHED: tl.constexpr, BLOCK_P: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """f and loss of one row, from the sums that `blocks` programs wrote.

    With GIVEN, the counts are those of `row_counts`. With STRETCHED, f and the mean of p are over S = Σ counts / K
    tokens, where K·(tokens of the row here) = `choices`; the f that is stored is multiplied by their ratio once more.
    """
    row = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    share = tl.zeros((BLOCK_P, EXPERTS), tl.float32)
    count = tl.zeros((BLOCK_P, EXPERTS), tl.int32)
    for first in range(0, blocks, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        place = (row * blocks + part).to(tl.int64)[:, None] * E + expert[None, :]
        inside = (part < blocks)[:, None] & (expert < E)[None, :]
        share += tl.load(shares + place, mask=inside, other=0.0)
        count += tl.load(counts + place, mask=inside, other=0)
    total = tl.sum(count, axis=0)
    if GIVEN:
        total = tl.load(row_counts + row.to(tl.int64) * E + expert, mask=expert < E, other=0)
    load = total.to(tl.float32) * count_scale
    if STRETCHED:
        stretch = choices / tl.maximum(tl.sum(total, axis=0), 1).to(tl.float32)
        load *= stretch
        share_scale *= stretch
        tl.store(loads + row.to(tl.int64) * E + expert, load * stretch, mask=expert < E)
    else:
        tl.store(loads + row.to(tl.int64) * E + expert, load, mask=expert < E)
    tl.store(losses + row, tl.sum(load * (tl.sum(share, axis=0) * share_scale), axis=0))


@triton.jit
def weigh_backward_kernel(
    grad, grad_losses, scores, indices, loads, out, S, E, blocks, scale, tiny,
    ACTIVE: tl.constexpr, GATES: tl.constexpr, BALANCE: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr, CHOICES: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Gradient of the scores of up to BLOCK_T tokens of one row, from GATES, BALANCE or both.

    With PADDED, it is 0 for a token whose choices are −1.
    """
    program = tl.program_id(0)
    within = (program % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = within < S
    row = (program // blocks).to(tl.int64)
    token = row * S + within
    expert = tl.arange(0, EXPERTS)
    known = there[:, None] & (expert < E)[None, :]
    line = token[:, None] * E
    result = tl.zeros((BLOCK_T, EXPERTS), tl.float32)
    if PADDED:
        there = there & (tl.load(indices + token * ACTIVE, mask=there, other=-1) >= 0)
    if GATES:
        choice = tl.arange(0, CHOICES)
        inside = there[:, None] & (choice < ACTIVE)[None, :]
        place = token[:, None] * ACTIVE + choice[None, :]
        chosen = tl.load(indices + place, mask=inside, other=0)
        score = tl.load(scores + line + chosen, mask=inside, other=0.0)
        total = tl.sum(score, axis=1)[:, None] + tiny
        q = tl.load(grad + place, mask=inside, other=0.0)
        ds = scale * (q - tl.sum(q * score, axis=1)[:, None] / total) / total
        for k in range(ACTIVE):
            this = (choice == k)[None, :]
            index = tl.sum(tl.where(this, chosen, 0), axis=1)
            value = tl.sum(tl.where(this, ds, 0.0), axis=1)
            result += tl.where(expert[None, :] == index[:, None], value[:, None], 0.0)
    if BALANCE:
        load = tl.load(loads + row * E + expert, mask=expert < E, other=0.0)[None, :]
        every = tl.load(scores + line + expert[None, :], mask=known, other=0.0)
        size = tl.where(there, tl.sum(every, axis=1), 1.0)[:, None]
        mean = tl.sum(load * every, axis=1)[:, None] / size
        result += tl.load(grad_losses + row) / S * (load - mean) / size
    if PADDED:
        result = tl.where(there[:, None], result, 0.0)
    tl.store(out + line + expert[None, :], result, mask=known)
