"""The routed experts: every token's K SwiGLU experts and their weighted sum, as one differentiable op.

y_t = Σ_k s_tk · W2_e · (silu(gate) ∘ up), [gate; up] = W1_e · x_t, e the k-th expert of token t (eq. 15 and 18).

Rows are grouped by expert (a stable sort of the choices), one matrix product per expert on its contiguous rows; an
expert without rows is ordinary, and so are no tokens at all. Saved for backward (as in SonicMoE, arXiv 2512.14080): x,
the pre-activations H, the choices and their weights; not the gathered x, the activations or the outputs. With
dA' = dy_gathered·W2: dA = s·dA', ds = rowsum(dA'∘A), dW2 = dyᵀ·(s·A), dH = dSwiGLU(dA, H), dW1 = dHᵀ·x_gathered.

Where experts are split among processes, a token's other experts are elsewhere: such a choice is −1, takes no row and
gets no gradient. How many choices are left is then said by the caller, so that no host waits for a device to count.

Shapes: T tokens, D width, E experts, F expert width, K active experts, R rows sorted by expert, one for each choice
that is not −1 (T·K without any), H = 2F.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity_kernels.linear import widened
from trinity_kernels.norm import wide
from trinity_kernels.op import Op


def group_rows(indices_TK: Tensor, experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """Sort the choices by expert, keeping the order of tokens within an expert; those of −1 are left out.

    Args:
        rows: R, how many choices are not −1.
    Returns:
        order_R [R] int64: which flattened choice stands in each row; ends_E [E] int32: the row after each expert's.
    """
    sorted_, order = indices_TK.flatten().sort(stable=True)
    nobody = order.numel() - rows  # they come first
    experts_E = torch.arange(experts, device=order.device)
    # not bincount, which waits for the device
    return order[nobody:], torch.searchsorted(sorted_[nobody:], experts_E, right=True, out_int32=True)


def _grouped_by_torch(x: Tensor) -> bool:
    # torch's grouped GEMM keeps the group sizes on the device: no host sync. It takes neither float64 nor a CPU's fp32
    # faster than a loop does.
    return x.is_cuda and x.dtype == torch.bfloat16


def _times_weights(rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, transpose: bool) -> Tensor:
    """Each expert's rows times its weight, transposed if asked: [R, I] → [R, O], or [R, O] → [R, I]."""
    if not len(rows_RI):  # no kernel is asked for nothing, and no device for its groups
        return rows_RI.new_empty(0, weight_EOI.shape[1 if transpose else 2])
    if _grouped_by_torch(rows_RI):
        return F.grouped_mm(rows_RI, weight_EOI.mT if transpose else weight_EOI, offs=ends_E)
    out = rows_RI.new_empty(rows_RI.shape[0], weight_EOI.shape[1 if transpose else 2])
    for expert, (start, end) in enumerate(_spans(ends_E)):
        weight = weight_EOI[expert].t() if transpose else weight_EOI[expert]
        _matmul_into(out[start:end], rows_RI[start:end], weight)
    return out


def _weight_gradient(grad_RO: Tensor, rows_RI: Tensor, ends_E: Tensor, weight_EOI: Tensor) -> Tensor:
    """dW_e = Σ over the expert's rows of grad ⊗ row: [E, O, I]; zero where the expert has no rows."""
    if not len(rows_RI):
        return torch.zeros_like(weight_EOI)
    if _grouped_by_torch(rows_RI):
        return F.grouped_mm(grad_RO.t(), rows_RI, offs=ends_E)
    out = torch.empty_like(weight_EOI)
    for expert, (start, end) in enumerate(_spans(ends_E)):
        _matmul_into(out[expert], grad_RO[start:end].t(), rows_RI[start:end])
    return out


def _spans(ends_E: Tensor) -> list[tuple[int, int]]:
    ends = ends_E.tolist()
    return list(zip([0, *ends[:-1]], ends))


def _matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    wide_a, wide_b = widened(a), widened(b)
    if wide_a is a:
        torch.mm(a, b, out=out)
    else:
        out.copy_(wide_a @ wide_b)


def _swiglu(pre_RH: Tensor) -> Tensor:
    gate, up = pre_RH.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@torch.library.custom_op("trinity::expert_mlp", mutates_args=())
def _forward(
    x_TD: Tensor, w1_EHD: Tensor, w2_EDF: Tensor, indices_TK: Tensor, s_TK: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    order_R, ends_E = group_rows(indices_TK, w1_EHD.shape[0], rows)
    pre_RH = _times_weights(x_TD.index_select(0, order_R // indices_TK.shape[1]), w1_EHD, ends_E, transpose=True)
    rows_RD = _times_weights(_swiglu(pre_RH), w2_EDF, ends_E, transpose=True)
    return _sum_per_token(rows_RD, order_R, indices_TK, s_TK).to(x_TD.dtype), pre_RH


@_forward.register_fake
def _(
    x_TD: Tensor, w1_EHD: Tensor, w2_EDF: Tensor, indices_TK: Tensor, s_TK: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_TD), x_TD.new_empty(rows, w1_EHD.shape[1])


def _sum_per_token(rows_RD: Tensor, order_R: Tensor, indices_TK: Tensor, s_TK: Tensor | None) -> Tensor:
    """Σ_k s_tk · row, in fp32, each token collecting its own rows: no atomics, so the same bits every time."""
    if len(order_R) < indices_TK.numel():
        found_T = (indices_TK >= 0).sum(dim=1)
        return sum_of_rows(rows_RD, order_R.argsort(), found_T, None if s_TK is None else wide(s_TK).flatten()[order_R])
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    rows_TKD = wide(rows_RD.index_select(0, place_R).view(*indices_TK.shape, rows_RD.shape[1]))
    if s_TK is None:
        return rows_TKD.sum(dim=1)
    return torch.bmm(wide(s_TK).unsqueeze(1), rows_TKD).squeeze_(1)  # squeeze_: no view leaves the op


def sum_of_rows(rows_RD: Tensor, place_R: Tensor, found_T: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """Each token's sum over its own rows, of which there may be any number: the same bits every time.

    Args:
        rows_RD: [R, D] floating point, in any order.
        place_R: [R] int64, where the first token's rows are, then the second's, and so on; added up in this order.
        found_T: [T] int64, how many rows each token has; they sum to R.
        weights_R: [R], fp32 or float64 like the sum, of each row where it stands; 1 by default.
    Returns:
        [T, D] fp32 (float64 for float64), not differentiable; zeros for a token without rows.
    """
    weights = None if weights_R is None else weights_R[place_R]
    starts_T = found_T.cumsum(0) - found_T
    return F.embedding_bag(place_R, wide(rows_RD), starts_T, mode="sum", per_sample_weights=weights)


@torch.library.custom_op("trinity::expert_mlp_backward", mutates_args=())
def _backward(
    grad_TD: Tensor, x_TD: Tensor, w1_EHD: Tensor, w2_EDF: Tensor, indices_TK: Tensor, s_TK: Tensor, pre_RH: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order_R, ends_E = group_rows(indices_TK, w1_EHD.shape[0], pre_RH.shape[0])
    token_R = order_R // indices_TK.shape[1]
    grad_RD = grad_TD.index_select(0, token_R)
    score_R1 = wide(s_TK).flatten()[order_R].unsqueeze(1)

    unscaled_RF = wide(_times_weights(grad_RD, w2_EDF, ends_E, transpose=False))
    gate, up = (wide(half) for half in pre_RH.chunk(2, dim=-1))
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    act_RF = silu * up
    grad_s_R = (unscaled_RF * act_RF).sum(dim=1)
    grad_w2 = _weight_gradient(grad_RD, (act_RF * score_R1).to(x_TD.dtype), ends_E, w2_EDF)

    grad_act_RF = unscaled_RF.mul_(score_R1)
    grad_up = grad_act_RF * silu
    # silu'(g) = σ(g)·(1 + g·(1 − σ(g))) = σ + silu·(1 − σ)
    grad_gate = grad_act_RF.mul_(up).mul_(sigmoid + silu * (1 - sigmoid))
    grad_pre_RH = torch.cat((grad_gate, grad_up), dim=1).to(x_TD.dtype)
    grad_w1 = _weight_gradient(grad_pre_RH, x_TD.index_select(0, token_R), ends_E, w1_EHD)
    rows_RD = _times_weights(grad_pre_RH, w1_EHD, ends_E, transpose=False)
    grad_x = _sum_per_token(rows_RD, order_R, indices_TK, None).to(x_TD.dtype)

    grad_s = grad_s_R.new_zeros(indices_TK.numel())
    grad_s[order_R] = grad_s_R
    return grad_x, grad_w1, grad_w2, grad_s.view_as(s_TK).to(s_TK.dtype)


@_backward.register_fake
def _(
    grad_TD: Tensor, x_TD: Tensor, w1_EHD: Tensor, w2_EDF: Tensor, indices_TK: Tensor, s_TK: Tensor, pre_RH: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x_TD), torch.empty_like(w1_EHD), torch.empty_like(w2_EDF), torch.empty_like(s_TK)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:-1], output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad_TD: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x_TD, w1_EHD, w2_EDF, indices_TK, s_TK, pre_RH = ctx.saved_tensors
    grad_x, grad_w1, grad_w2, grad_s = _backward(grad_TD.contiguous(), x_TD, w1_EHD, w2_EDF, indices_TK, s_TK, pre_RH)
    return grad_x, grad_w1, grad_w2, None, grad_s, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _expert_mlp(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, indices_TK: Tensor, s_TK: Tensor, rows: int | None = None
) -> Tensor:
    """Weighted sum of each token's K experts, of those that are here.

    Args:
        x_TD: [T, D] floating point; T may be 0.
        gate_up_E2FD: [E, 2, F, D], x's dtype, contiguous: gate first, then up.
        down_EDF: [E, D, F], x's dtype.
        indices_TK: [T, K] int64, each in [0, E), or −1 for a choice that is not computed here.
        s_TK: [T, K] fp32 or float64, the gates; that of a −1 may be anything and its gradient is 0.
        rows: how many choices are not −1, exactly; None: all.
    Returns:
        [T, D], x's dtype; the sum over K is taken in fp32 (float64 stays float64). Zeros for a token of −1 alone.
    """
    rows = indices_TK.numel() if rows is None else rows
    return _forward(x_TD, gate_up_E2FD.flatten(1, 2), down_EDF, indices_TK, s_TK, rows)[0]


expert_mlp = Op(_expert_mlp)
