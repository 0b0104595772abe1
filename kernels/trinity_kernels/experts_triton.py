"""The routed experts in Triton, in SonicMoE's order of computation (arXiv 2512.14080).

forward     up       H = X[token]·W1ᵀ, gathering rows of X inside the product; A = silu(gate)∘up in its epilogue
            down     Y = A·W2ᵀ, contiguous in and out
            combine  out_t = plus_t + Σ_k s_tk · Y[place_tk] in fp32, computed per token over its own rows
backward    dpre     dA' = dO[token]·W2; in its epilogue, with A computed again from H: ds = rowsum(dA'∘A), A' = s·A,
                     dH = the gradient of SwiGLU at s·dA'
            dW2 = Σ dO[token] ⊗ A',  dW1 = Σ dH ⊗ X[token]
            dX̃ = dH·W1, then combine without weights

Saved for backward: X, H, the grouping and the gates; not the gathered X, A or Y. With keep_pre=False H is not saved
either, and backward repeats the up product.

Shapes: T tokens, K active experts, R rows sorted by expert, D width, F expert width, H = 2F, E experts.
"""

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from trinity_kernels.combine import Places
from trinity_kernels.custom_op import custom_op
from trinity_kernels.grouped_gemm_triton import Tile, halves, matmul, outer, precision
from trinity_kernels.grouping import group_rows, tile_table
from trinity_kernels.language import TensorDescriptor, cdiv, next_power_of_2, tl, triton


def up_tile(width: int, hidden: int, dtype: torch.dtype) -> Tile:
    """Tile of the up product: n counts columns of the expert width; two accumulators, gate and up."""
    if dtype == torch.float32:
        return Tile(32, 32, 32, 4, 2)
    if hidden <= 256:
        return Tile(64, 64, 64, 4, 4)
    return Tile(128, 128, 64, 8, 3)


def dpre_tile(width: int, hidden: int, dtype: torch.dtype) -> Tile:
    """Tile of dpre: its epilogue holds four tiles at a time, so it processes the accumulator in parts."""
    if dtype == torch.float32:
        return Tile(32, 32, 32, 4, 2)
    if hidden <= 256:
        return Tile(64, 128, 64, 4, 3, parts=4)
    return Tile(128, 128, 64, 8, 3, parts=2)


def expert_mlp(
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    indices_TK: Tensor,
    s_TK: Tensor,
    rows: int | None = None,
    keep_pre: bool = True,
    plus_TD: Tensor | None = None,
) -> Tensor:
    """See trinity_kernels.expert_mlp."""
    rows = indices_TK.numel() if rows is None else rows
    plus_TD = None if plus_TD is None else plus_TD.contiguous()
    return forward_op(x_TD.contiguous(), gate_up_E2FD, down_EDF, indices_TK, s_TK, rows, keep_pre, plus_TD)[0]


def forward(
    x_TD: Tensor, w1_E2FD: Tensor, w2_EDF: Tensor, indices_TK: Tensor, s_TK: Tensor, rows: int, keep_pre: bool,
    plus_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The weighted sums, and the tensors for backward: out [T, D], H [R, 2F] (or [0, 2F]), and the three of Groups."""
    groups = group_rows.triton(indices_TK, len(w1_E2FD), rows)
    active = indices_TK.shape[1]
    pre_RH, act_RF = up(x_TD, w1_E2FD, groups.order_R, groups.ends_E, active, keep_pre)
    y_RD = matmul(act_RF, w2_EDF, groups.ends_E, transpose=True)
    out_TD = combine(y_RD, groups.place_TK, s_TK, plus_TD)
    return out_TD, pre_RH, groups.order_R, groups.place_TK, groups.ends_E


def backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    w1_E2FD: Tensor,
    w2_EDF: Tensor,
    s_TK: Tensor,
    kept: tuple[Tensor, Tensor, Tensor, Tensor],
    into: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the gates, and both weights.

    Args:
        kept: H, order, place and ends, as returned by forward.
        into: fp32 gradients of both weights to add to, in the weights' shapes; None: new tensors of `dtype`.
    """
    pre_RH, order_R, place_TK, ends_E = kept
    active = s_TK.shape[1]
    if len(pre_RH) < len(order_R):
        pre_RH = up(x_TD, w1_E2FD, order_R, ends_E, active, keep_pre=True)[0]
    grad_pre_RH, scaled_RF, grad_s_TK = dpre(grad_TD, w2_EDF, pre_RH, s_TK, order_R, place_TK, ends_E)
    into_1, into_2 = (None, None) if into is None else (into[0].flatten(1, 2), into[1])
    grad_w2 = outer(grad_TD, scaled_RF, ends_E, order_R, active, "left", into_2, dtype)
    grad_w1 = outer(grad_pre_RH, x_TD, ends_E, order_R, active, "right", into_1, dtype)
    grad_x = combine(matmul(grad_pre_RH, w1_E2FD.flatten(1, 2), ends_E, transpose=False), place_TK)
    return grad_x, grad_s_TK, grad_w1.view(w1_E2FD.shape), grad_w2


def up(
    x_TD: Tensor, w1_E2FD: Tensor, order_R: Tensor, ends_E: Tensor, active: int, keep_pre: bool
) -> tuple[Tensor, Tensor]:
    """H [R, 2F], or [0, 2F] without keep_pre, and A [R, F]."""
    (_, _, F, D), R = w1_E2FD.shape, len(order_R)
    pre_RH, act_RF = x_TD.new_empty(R if keep_pre else 0, 2 * F), x_TD.new_empty(R, F)
    if R:
        tile = up_tile(D, F, x_TD.dtype)
        tiles = tile_table.triton(ends_E, R, tile.m)
        up_kernel[(len(tiles) * cdiv(F, tile.n),)](
            x_TD, TensorDescriptor.from_tensor(w1_E2FD.flatten(0, 2), [tile.n, tile.k]), pre_RH, act_RF,
            order_R, tiles, D, F, active,
            KEEP=keep_pre, EVEN=D % tile.k == 0, PRECISION=precision(x_TD.dtype), **tile.options(),
        )  # fmt: skip
    return pre_RH, act_RF


def dpre(
    grad_TD: Tensor, w2_EDF: Tensor, pre_RH: Tensor, s_TK: Tensor, order_R: Tensor, place_TK: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dH [R, 2F], s·A [R, F] and the gates' gradient [T, K] in the gates' dtype, 0 for a choice of −1."""
    (_, D, F), (R, active) = w2_EDF.shape, (len(order_R), s_TK.shape[1])
    if not R:
        return pre_RH, pre_RH.new_empty(0, F), torch.zeros_like(s_TK)
    tile = dpre_tile(D, F, grad_TD.dtype)
    tiles = tile_table.triton(ends_E, R, tile.m)
    blocks = cdiv(F, tile.n)
    grad_pre_RH, scaled_RF = torch.empty_like(pre_RH), pre_RH.new_empty(R, F)
    sums_BR = s_TK.new_empty(blocks, R, dtype=torch.float32)  # one partial sum per row and block of columns
    dpre_kernel[(len(tiles) * blocks,)](
        grad_TD, TensorDescriptor.from_tensor(w2_EDF.flatten(0, 1), [tile.k, tile.n]), pre_RH, s_TK,
        grad_pre_RH, scaled_RF, sums_BR, order_R, tiles, D, F, R, active,
        EVEN=D % tile.k == 0, PRECISION=precision(grad_TD.dtype), PARTS=tile.parts, **tile.options(),
    )  # fmt: skip
    grad_s = sums_BR.sum(dim=0)[place_TK.clamp_min(0).flatten()].view_as(s_TK)
    return grad_pre_RH, scaled_RF, grad_s.where(place_TK >= 0, 0.0).to(s_TK.dtype)


def combine(rows_RD: Tensor, place_TK: Tensor, s_TK: Tensor | None = None, plus_TD: Tensor | None = None) -> Tensor:
    """Each token's sum over its rows, weighted by s if given, and plus: [T, D], the rows' dtype, summed in fp32."""
    (T, active), D = place_TK.shape, rows_RD.shape[1]
    out_TD = rows_RD.new_empty(T, D)
    if T:
        columns = min(1024, next_power_of_2(D))
        tokens = max(1, 2048 // columns)
        combine_kernel[(cdiv(T, tokens), cdiv(D, columns))](
            rows_RD, out_TD, place_TK,
            place_TK if s_TK is None else s_TK, rows_RD if plus_TD is None else plus_TD, T, D,
            ACTIVE=active, WEIGHTED=s_TK is not None, PLUS=plus_TD is not None, BLOCK_T=tokens, BLOCK_D=columns,
            num_warps=4,
        )  # fmt: skip
    return out_TD


def combine_rows(rows_RD: Tensor, places: Places, plus_TD: Tensor | None = None) -> Tensor:
    """See trinity_kernels.combine."""
    return combine(rows_RD.contiguous(), places.place_TK, None, None if plus_TD is None else plus_TD.contiguous())


@triton.jit
def up_kernel(
    x, w1, pre, act, order, tiles, D, F, active,
    KEEP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gate and up of [BLOCK_M rows, BLOCK_N features], accumulated together; SwiGLU is applied in registers."""
    blocks_n = tl.cdiv(F, BLOCK_N)
    entry = tiles + 3 * (tl.program_id(0) // blocks_n)
    n = (tl.program_id(0) % blocks_n) * BLOCK_N
    expert, first, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    if expert < 0:
        return
    row = first + tl.arange(0, BLOCK_M)
    token = tl.load(order + row, mask=row < end, other=0) // active
    line = x + token.to(tl.int64)[:, None] * D
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        left = _columns(line, k, D, EVEN, BLOCK_K)
        gate = tl.dot(left, w1.load([expert * 2 * F + n, k]).T, gate, input_precision=PRECISION)
        up = tl.dot(left, w1.load([expert * 2 * F + F + n, k]).T, up, input_precision=PRECISION)
    column = n + tl.arange(0, BLOCK_N)
    inside = (row < end)[:, None] & (column < F)[None, :]
    row = row.to(tl.int64)[:, None]
    if KEEP:
        place = pre + row * (2 * F) + column[None, :]
        tl.store(place, gate.to(pre.dtype.element_ty), mask=inside)
        tl.store(place + F, up.to(pre.dtype.element_ty), mask=inside)
    activation = gate * tl.sigmoid(gate) * up
    tl.store(act + row * F + column[None, :], activation.to(act.dtype.element_ty), mask=inside)


@triton.jit
def dpre_kernel(
    grad, w2, pre, s, grad_pre, scaled, sums, order, tiles, D, F, R, active,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dA' of [BLOCK_M rows, BLOCK_N features]; its epilogue computes dH, s·A and the rows' partial ds."""
    blocks_n = tl.cdiv(F, BLOCK_N)
    entry = tiles + 3 * (tl.program_id(0) // blocks_n)
    block = tl.program_id(0) % blocks_n
    expert, first, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    if expert < 0:
        return
    row = first + tl.arange(0, BLOCK_M)
    choice = tl.load(order + row, mask=row < end, other=0)
    line = grad + (choice // active).to(tl.int64)[:, None] * D
    unscaled = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        left = _columns(line, k, D, EVEN, BLOCK_K)
        unscaled = tl.dot(left, w2.load([expert * D + k, block * BLOCK_N]), unscaled, input_precision=PRECISION)
    score = tl.load(s + choice).to(tl.float32)
    n = block * BLOCK_N
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    if PARTS == 1:
        total = _dpre_part(unscaled, pre, score, grad_pre, scaled, row, end, n, F, WIDTH)
    elif PARTS == 2:
        left_half, right_half = halves(unscaled, BLOCK_M, BLOCK_N)
        total = _dpre_part(left_half, pre, score, grad_pre, scaled, row, end, n, F, WIDTH)
        total += _dpre_part(right_half, pre, score, grad_pre, scaled, row, end, n + WIDTH, F, WIDTH)
    else:
        left_half, right_half = halves(unscaled, BLOCK_M, BLOCK_N)
        one, two = halves(left_half, BLOCK_M, BLOCK_N // 2)
        total = _dpre_part(one, pre, score, grad_pre, scaled, row, end, n, F, WIDTH)
        total += _dpre_part(two, pre, score, grad_pre, scaled, row, end, n + WIDTH, F, WIDTH)
        three, four = halves(right_half, BLOCK_M, BLOCK_N // 2)
        total += _dpre_part(three, pre, score, grad_pre, scaled, row, end, n + 2 * WIDTH, F, WIDTH)
        total += _dpre_part(four, pre, score, grad_pre, scaled, row, end, n + 3 * WIDTH, F, WIDTH)
    tl.store(sums + block.to(tl.int64) * R + row, total, mask=row < end)


@triton.jit
def _dpre_part(unscaled, pre, score, grad_pre, scaled, row, end, n, F, WIDTH: tl.constexpr):
    """The epilogue of WIDTH columns; returns rowsum(dA'∘A) over them."""
    column = n + tl.arange(0, WIDTH)
    inside = (row < end)[:, None] & (column < F)[None, :]
    row = row.to(tl.int64)[:, None]
    place = row * (2 * F) + column[None, :]
    gate = tl.load(pre + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(pre + place + F, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    total = tl.sum(tl.where(inside, unscaled * silu * up, 0.0), axis=1)
    score = score[:, None]
    tl.store(scaled + row * F + column[None, :], (score * silu * up).to(scaled.dtype.element_ty), mask=inside)
    grad_act = score * unscaled
    # silu'(g) = σ(g)·(1 + g·(1 − σ(g))) = σ + silu·(1 − σ)
    grad_gate = grad_act * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(grad_pre + place, grad_gate.to(grad_pre.dtype.element_ty), mask=inside)
    tl.store(grad_pre + place + F, (grad_act * silu).to(grad_pre.dtype.element_ty), mask=inside)
    return total


@triton.jit
def _columns(line, k, width, EVEN: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS columns, from k on, of the rows that `line` points to; zeros past the width."""
    column = k + tl.arange(0, COLUMNS)
    if EVEN:
        return tl.load(line + column[None, :])
    return tl.load(line + column[None, :], mask=(column < width)[None, :], other=0.0)


@triton.jit
def combine_kernel(
    rows, out, places, s, plus, T, D,
    ACTIVE: tl.constexpr, WEIGHTED: tl.constexpr, PLUS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens' sums over BLOCK_D columns, added in the order of the choices, and plus after them."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    there = token < T
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in range(ACTIVE):
        choice = token.to(tl.int64) * ACTIVE + k
        place = tl.load(places + choice, mask=there, other=-1)
        inside = (place >= 0)[:, None] & (column < D)[None, :]
        row = tl.load(rows + place.to(tl.int64)[:, None] * D + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            row *= tl.load(s + choice, mask=there & (place >= 0), other=0.0).to(tl.float32)[:, None]
        total += row
    inside = there[:, None] & (column < D)[None, :]
    place = token.to(tl.int64)[:, None] * D + column[None, :]
    if PLUS:
        total += tl.load(plus + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@custom_op("trinity::expert_mlp_triton")
def forward_op(
    x_TD: Tensor, w1_E2FD: Tensor, w2_EDF: Tensor, indices_TK: Tensor, s_TK: Tensor, rows: int, keep_pre: bool,
    plus_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`forward` as a custom op, known to autograd, torch.compile and recompute."""
    return forward(x_TD, w1_E2FD, w2_EDF, indices_TK, s_TK, rows, keep_pre, plus_TD)


@forward_op.register_fake
def _(
    x_TD: Tensor, w1_E2FD: Tensor, w2_EDF: Tensor, indices_TK: Tensor, s_TK: Tensor, rows: int, keep_pre: bool,
    plus_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    integers = indices_TK.new_empty
    return (
        torch.empty_like(x_TD),
        x_TD.new_empty(rows if keep_pre else 0, 2 * w2_EDF.shape[2]),
        integers(rows, dtype=torch.int32),
        integers(indices_TK.shape, dtype=torch.int32),
        integers(len(w1_E2FD), dtype=torch.int32),
    )


@custom_op("trinity::expert_mlp_triton_backward")
def backward_op(
    grad_TD: Tensor, x_TD: Tensor, w1_E2FD: Tensor, w2_EDF: Tensor, s_TK: Tensor,
    pre_RH: Tensor, order_R: Tensor, place_TK: Tensor, ends_E: Tensor, wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`backward` as a custom op; the weights' gradients in fp32 if wide, else in the weights' dtype."""
    kept = pre_RH, order_R, place_TK, ends_E
    return backward(grad_TD, x_TD, w1_E2FD, w2_EDF, s_TK, kept, dtype=torch.float32 if wide else None)


@backward_op.register_fake
def _(
    grad_TD: Tensor, x_TD: Tensor, w1_E2FD: Tensor, w2_EDF: Tensor, s_TK: Tensor,
    pre_RH: Tensor, order_R: Tensor, place_TK: Tensor, ends_E: Tensor, wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = torch.float32 if wide else w1_E2FD.dtype
    weights = (w1_E2FD.new_empty(w1_E2FD.shape, dtype=dtype), w2_EDF.new_empty(w2_EDF.shape, dtype=dtype))
    return torch.empty_like(x_TD), torch.empty_like(s_TK), *weights


@custom_op("trinity::expert_mlp_triton_backward_into", mutates_args=("into_1", "into_2"))
def backward_into_op(
    grad_TD: Tensor, x_TD: Tensor, w1_E2FD: Tensor, w2_EDF: Tensor, s_TK: Tensor,
    pre_RH: Tensor, order_R: Tensor, place_TK: Tensor, ends_E: Tensor, into_1: Tensor, into_2: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`backward` as a custom op that adds the weights' gradients to existing fp32 ones."""
    kept = pre_RH, order_R, place_TK, ends_E
    return backward(grad_TD, x_TD, w1_E2FD, w2_EDF, s_TK, kept, into=(into_1, into_2))[:2]


@backward_into_op.register_fake
def _(
    grad_TD: Tensor, x_TD: Tensor, w1_E2FD: Tensor, w2_EDF: Tensor, s_TK: Tensor,
    pre_RH: Tensor, order_R: Tensor, place_TK: Tensor, ends_E: Tensor, into_1: Tensor, into_2: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x_TD), torch.empty_like(s_TK)


def _save(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x_TD, w1_E2FD, w2_EDF, _, s_TK, _, _, plus_TD = inputs
    ctx.adds = plus_TD is not None
    ctx.save_for_backward(x_TD, w1_E2FD, w2_EDF, s_TK, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, grad_TD: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x_TD, w1_E2FD, w2_EDF, s_TK, *kept = ctx.saved_tensors
    arguments = (grad_TD.contiguous(), x_TD, w1_E2FD, w2_EDF, s_TK, *kept)
    grad_plus = grad_TD if ctx.adds else None
    # of a frozen weight neither the dtype of its gradient matters nor the gradient, which autograd drops
    weights = [_leaf(w) for w, trained in zip((w1_E2FD, w2_EDF), ctx.needs_input_grad[1:3]) if trained]
    wide = bool(weights) and all(_gradient_dtype(weight) == torch.float32 for weight in weights)
    main = [weight.grad for weight in weights if weight.is_leaf and weight.grad is not None]
    if wide and len(main) == 2:
        grad_x, grad_s = backward_into_op(*arguments, *main)
        return grad_x, None, None, None, grad_s, None, None, grad_plus
    grad_x, grad_s, grad_w1, grad_w2 = backward_op(*arguments, wide)
    return grad_x, grad_w1, grad_w2, None, grad_s, None, None, grad_plus


forward_op.register_autograd(_differentiate, setup_context=_save)


def _leaf(weight: Tensor) -> Tensor:
    """The leaf that a saved weight is: recompute returns a copy of a leaf, without its `grad` and `grad_dtype`."""
    if torch.compiler.is_compiling() or not (weight.is_leaf and weight.requires_grad):
        return weight
    return get_gradient_edge(weight).node.variable  # type: ignore[attr-defined]  # the node that accumulates


def _gradient_dtype(weight: Tensor) -> torch.dtype | None:
    """The dtype of the weight's gradient: a leaf's `grad_dtype` if it has that attribute, else the weight's dtype."""
    return getattr(weight, "grad_dtype", weight.dtype) if weight.is_leaf else weight.dtype
