"""The routed experts as one differentiable op: each token's K SwiGLU experts and their weighted sum.

y_t = plus_t + Σ_k s_tk · W2_e · (silu(gate) ∘ up), [gate; up] = W1_e · x_t, e the k-th expert of token t (eq. 15 and
18); plus_t, the shared expert's output, is added to the sum in fp32 before it is rounded.

Rows are grouped by expert (a stable sort of the choices); each expert multiplies its contiguous rows. An expert without
rows and a batch without tokens are allowed.

Saved for backward (as in SonicMoE, arXiv 2512.14080): x, the pre-activations H, the choices and their weights; not the
gathered x, the activations or the outputs. With dA' = dy_gathered·W2: dA = s·dA', ds = rowsum(dA'∘A), dW2 = dyᵀ·(s·A),
dH = dSwiGLU(dA, H), dW1 = dHᵀ·x_gathered.
On one CPU thread in fp32, and in 16 bits without bf16 arithmetic (experts_cpu.py): one expert after the other.
Triton (experts_triton.py): gathering and SwiGLU happen inside the matrix products, and H may be computed again.

Under expert parallelism some of a token's experts are on other ranks. Their choices are −1, take no row and get no
gradient. The caller passes the number of remaining choices, so that the host does not wait for a count.

Shapes: T tokens, D width, E experts, F expert width, K active experts, R rows sorted by expert, one per choice that is
not −1 (T·K if there is no −1), H = 2F.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity_kernels import experts_cpu
from trinity_kernels.grouped_gemm import grouped_matmul, grouped_outer, pads, refuses
from trinity_kernels.grouping import Groups, group_rows
from trinity_kernels.norm import wide
from trinity_kernels.op import Op
from trinity_kernels.swiglu import weighted_swiglu_backward


def _swiglu(pre_RH: Tensor) -> Tensor:
    gate, up = pre_RH.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _one_by_one(x: Tensor) -> bool:
    """Whether experts_cpu computes, one expert after the other: on one thread, where grouped products do not pad.

    Several threads must meet after each of its many short operations, which takes longer than the cache saves.
    """
    return x.device.type == "cpu" and x.dtype != torch.float64 and torch.get_num_threads() == 1 and not pads(x)


def _few_rows(x: Tensor, rows: int) -> bool:
    """Whether experts_cpu.forward_few_rows computes: generation on a CPU."""
    few = rows <= experts_cpu.FEW_ROWS and not torch.is_grad_enabled() and x.dtype != torch.float64
    return few and type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


@torch.library.custom_op("trinity::expert_mlp", mutates_args=())
def _forward(
    x_TD: Tensor, w1_EHD: Tensor, w2_EDF: Tensor, indices_TK: Tensor, s_TK: Tensor, rows: int,
    plus_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if _one_by_one(x_TD):
        return experts_cpu.forward(x_TD, w1_EHD, w2_EDF, indices_TK, s_TK, rows, plus_TD)
    groups = group_rows.reference(indices_TK, w1_EHD.shape[0], rows)
    token_R = groups.order_R // indices_TK.shape[1]
    pre_RH = grouped_matmul.reference(x_TD.index_select(0, token_R), w1_EHD, groups.ends_E, transpose=True)
    rows_RD = grouped_matmul.reference(_swiglu(pre_RH), w2_EDF, groups.ends_E, transpose=True)
    sums_TD = _sum_per_token(rows_RD, groups, s_TK)
    if plus_TD is not None:
        sums_TD += plus_TD
    return sums_TD.to(x_TD.dtype), pre_RH


@_forward.register_fake
def _(
    x_TD: Tensor, w1_EHD: Tensor, w2_EDF: Tensor, indices_TK: Tensor, s_TK: Tensor, rows: int,
    plus_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x_TD), x_TD.new_empty(rows, w1_EHD.shape[1])


def _sum_per_token(rows_RD: Tensor, groups: Groups, s_TK: Tensor | None) -> Tensor:
    """Σ_k s_tk · row in fp32, computed per token over its own rows: no atomics, so the same bits every time."""
    order_R, place_TK, _ = groups
    if len(order_R) < place_TK.numel():
        weights_R = None if s_TK is None else wide(s_TK).flatten()[order_R]
        return sum_of_rows(rows_RD, order_R.argsort(), (place_TK >= 0).sum(dim=1), weights_R)
    if rows_RD.device.type == "cpu" and rows_RD.dtype != torch.float64:
        counts_T = torch.full(place_TK.shape[:1], place_TK.shape[1])
        weights_R = None if s_TK is None else wide(s_TK).flatten()[order_R]
        return sum_of_rows(rows_RD, place_TK.flatten().long(), counts_T, weights_R)
    rows_TKD = wide(rows_RD.index_select(0, place_TK.flatten()).view(*place_TK.shape, rows_RD.shape[1]))
    if s_TK is None:
        return rows_TKD.sum(dim=1)
    return torch.bmm(wide(s_TK).unsqueeze(1), rows_TKD).squeeze_(1)  # squeeze_: no view leaves the op


def sum_of_rows(rows_RD: Tensor, place_R: Tensor, counts_T: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """Each token's sum over its rows, any number of them; the same bits every time.

    Args:
        rows_RD: [R, D] floating point, in any order.
        place_R: [R] int64, indices of the first token's rows, then of the second's, and so on; the order of summation.
        counts_T: [T] int64, number of rows of each token; they sum to R.
        weights_R: [R], weight of each row of rows_RD, fp32 or float64 like the sum; 1 by default.
    Returns:
        [T, D] fp32 (float64 for float64), not differentiable; zeros for a token without rows.
    """
    weights = None if weights_R is None else weights_R[place_R]
    starts_T = counts_T.cumsum(0) - counts_T
    return F.embedding_bag(place_R, wide(rows_RD), starts_T, mode="sum", per_sample_weights=weights)


@torch.library.custom_op("trinity::expert_mlp_backward", mutates_args=())
def _backward(
    grad_TD: Tensor, x_TD: Tensor, w1_EHD: Tensor, w2_EDF: Tensor, indices_TK: Tensor, s_TK: Tensor, pre_RH: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _one_by_one(x_TD):
        return experts_cpu.backward(grad_TD, x_TD, w1_EHD, w2_EDF, indices_TK, s_TK, pre_RH)
    groups = group_rows.reference(indices_TK, w1_EHD.shape[0], pre_RH.shape[0])
    order_R, _, ends_E = groups
    token_R = order_R // indices_TK.shape[1]
    grad_RD = grad_TD.index_select(0, token_R)
    score_R1 = wide(s_TK).flatten()[order_R].unsqueeze(1)

    unscaled_RF = wide(grouped_matmul.reference(grad_RD, w2_EDF, ends_E, transpose=False))
    scaled_RF, grad_pre_RH, grad_s_R = weighted_swiglu_backward(unscaled_RF, pre_RH, score_R1)
    grad_w2 = grouped_outer.reference(grad_RD, scaled_RF.to(x_TD.dtype), ends_E)
    grad_pre_RH = grad_pre_RH.to(x_TD.dtype)
    grad_w1 = grouped_outer.reference(grad_pre_RH, x_TD.index_select(0, token_R), ends_E)
    rows_RD = grouped_matmul.reference(grad_pre_RH, w1_EHD, ends_E, transpose=False)
    grad_x = _sum_per_token(rows_RD, groups, None).to(x_TD.dtype)

    grad_s = grad_s_R.new_zeros(indices_TK.numel())
    grad_s[order_R] = grad_s_R
    return grad_x, grad_w1, grad_w2, grad_s.view_as(s_TK).to(s_TK.dtype)


@_backward.register_fake
def _(
    grad_TD: Tensor, x_TD: Tensor, w1_EHD: Tensor, w2_EDF: Tensor, indices_TK: Tensor, s_TK: Tensor, pre_RH: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x_TD), torch.empty_like(w1_EHD), torch.empty_like(w2_EDF), torch.empty_like(s_TK)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # no zeros [R, 2F] as the gradient of the pre-activations
    *tensors, _, plus_TD = inputs
    ctx.adds = plus_TD is not None
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad_TD: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_TD is None:
        return (None,) * 7
    x_TD, w1_EHD, w2_EDF, indices_TK, s_TK, pre_RH = ctx.saved_tensors
    grad_x, grad_w1, grad_w2, grad_s = _backward(grad_TD.contiguous(), x_TD, w1_EHD, w2_EDF, indices_TK, s_TK, pre_RH)
    return grad_x, grad_w1, grad_w2, None, grad_s, None, grad_TD if ctx.adds else None


_forward.register_autograd(_differentiate, setup_context=_save)


def _expert_mlp(
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    indices_TK: Tensor,
    s_TK: Tensor,
    rows: int | None = None,
    keep_pre: bool = True,
    plus_TD: Tensor | None = None,
) -> Tensor:
    """Weighted sum of each token's K experts; a choice of −1 contributes nothing.

    Args:
        x_TD: [T, D] floating point; T may be 0.
        gate_up_E2FD: [E, 2, F, D], x's dtype, contiguous: gate first, then up.
        down_EDF: [E, D, F], x's dtype.
        indices_TK: [T, K] int64, each in [0, E), or −1 for a choice that is not computed on this rank.
        s_TK: [T, K] fp32 or float64, the gates; the gate of a −1 is ignored and gets a gradient of 0.
        rows: exact number of choices that are not −1; None: all.
        keep_pre: save H for backward (2F numbers per row), or compute it again there; the reference always saves it.
        plus_TD: [T, D], x's dtype, added to each token's sum; its gradient is the output's. None: nothing is added.
    Returns:
        [T, D], x's dtype; the sum over K and plus_TD is in fp32 (float64 stays float64) and rounded once. Without
        plus_TD zeros for a token whose choices are all −1.
    """
    rows = indices_TK.numel() if rows is None else rows
    if _few_rows(x_TD, rows):
        return experts_cpu.forward_few_rows(x_TD, gate_up_E2FD.flatten(1, 2), down_EDF, indices_TK, s_TK, plus_TD)
    return _forward(x_TD, gate_up_E2FD.flatten(1, 2), down_EDF, indices_TK, s_TK, rows, plus_TD)[0]


def _refuses(x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, *_: object, **__: object) -> str | None:
    return refuses(x_TD, down_EDF)


expert_mlp = Op(_expert_mlp, "trinity_kernels.experts_triton:expert_mlp", _refuses)
