"""The routed experts on one CPU thread, one expert after the other, so that an expert's rows stay in the cache.

The same computation as in experts.py, which takes one step after the other over the rows of all experts: with 2048
tokens of 4 experts each and a width of 256, a step reads and writes 8 MB. Here each expert's rows are gathered,
multiplied and added to their tokens' sums before the next expert begins. In fp32 and 16 bits; float64 takes the other.

forward    x = X[token]   H = x·W1ᵀ   A = silu(gate)∘up   y = s·(A·W2ᵀ)   out[token] += y
backward   dO[token]·W2 = dA'   ds = rowsum(dA'∘A)   dW2 = dOᵀ·(s·A)   dH   dW1 = dHᵀ·x   dX[token] += dH·W1

A token has at most one row at an expert, so no two rows are added to one sum at once: the same bits on
repetition. Sums of tokens are in fp32, in the order of the experts.
Few rows without gradients (generation) take `forward_few_rows`: they fit in the cache anyway, so every step but the two
products is one operation over all rows, on any number of threads.
Saved for backward, as by the reference: x, H, the choices and their weights.

Shapes: T tokens, D width, E experts, F expert width, K active experts, R rows sorted by expert, H = 2F, N rows of one
expert.
"""

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity_kernels.grouping import Groups, group_rows
from trinity_kernels.linear import linear_forward, linear_grad_input, linear_grad_weight
from trinity_kernels.norm import wide
from trinity_kernels.swiglu import weighted_swiglu_backward

FEW_ROWS = 64
"""Most rows of forward_few_rows: it takes half of forward's time at 1 and at 8 tokens of 4 experts."""


def forward(
    x_TD: Tensor, w1_EHD: Tensor, w2_EDF: Tensor, indices_TK: Tensor, s_TK: Tensor, rows: int,
    plus_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The weighted sums [T, D], with plus_TD if given, and H [R, 2F] for backward; see trinity_kernels.expert_mlp."""
    groups = group_rows.reference(indices_TK, len(w1_EHD), rows)
    score_R1 = wide(s_TK).flatten()[groups.order_R].unsqueeze(1)
    pre_RH = x_TD.new_empty(rows, w1_EHD.shape[1])
    out_TD = torch.zeros_like(x_TD, dtype=score_R1.dtype) if plus_TD is None else plus_TD.to(score_R1.dtype, copy=True)
    for expert, span, token_N in _experts_with_rows(groups, indices_TK.shape[1]):
        pre_NH = linear_forward(x_TD.index_select(0, token_N), w1_EHD[expert], out=pre_RH[span])
        gate_NF, up_NF = wide(pre_NH).chunk(2, dim=1)
        act_NF = F.silu(gate_NF).mul_(up_NF).to(x_TD.dtype)
        y_ND = wide(linear_forward(act_NF, w2_EDF[expert]))
        out_TD.index_add_(0, token_N, y_ND.mul_(score_R1[span]))
    return out_TD.to(x_TD.dtype), pre_RH


def forward_few_rows(
    x_TD: Tensor, w1_EHD: Tensor, w2_EDF: Tensor, indices_TK: Tensor, s_TK: Tensor, plus_TD: Tensor | None = None
) -> Tensor:
    """The sums that `forward` returns, in the same order of operations; not differentiable."""
    expert_of = indices_TK.flatten().tolist()
    choices = sorted((choice for choice, expert in enumerate(expert_of) if expert >= 0), key=expert_of.__getitem__)
    if not choices:
        return torch.zeros_like(x_TD) if plus_TD is None else plus_TD.clone()
    rows_of = {expert: len(list(rows)) for expert, rows in groupby(choices, expert_of.__getitem__)}
    order_R = torch.tensor(choices, device=x_TD.device)
    token_R = order_R // indices_TK.shape[1]
    pre_RH = _product_of_each(x_TD.index_select(0, token_R), w1_EHD, rows_of)
    gate_RF, up_RF = wide(pre_RH).chunk(2, dim=1)
    y_RD = _product_of_each(F.silu(gate_RF).mul_(up_RF).to(x_TD.dtype), w2_EDF, rows_of)
    score_R1 = wide(s_TK).flatten()[order_R].unsqueeze(1)
    out_TD = torch.zeros_like(x_TD, dtype=score_R1.dtype) if plus_TD is None else plus_TD.to(score_R1.dtype, copy=True)
    return _add_rows_of_each(out_TD, wide(y_RD).mul_(score_R1), token_R.tolist()).to(x_TD.dtype)


def forward_one_token(
    x_1D: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, indices_1K: Tensor, s_1K: Tensor, plus_TD: Tensor
) -> Tensor:
    """expert_mlp of one token in fp32, all of whose experts are here; summed in the order of K, not differentiable."""
    experts = indices_1K[0].tolist()
    pre_K2F = torch.cat([F.linear(x_1D, gate_up_E2FD[expert].flatten(0, 1)) for expert in experts])
    gate_KF, up_KF = pre_K2F.chunk(2, dim=1)
    act_KF = F.silu(gate_KF).mul_(up_KF)
    y_KD = torch.cat([F.linear(act_1F, down_EDF[expert]) for act_1F, expert in zip(act_KF.split(1), experts)])
    return torch.addmm(plus_TD, s_1K, y_KD)


def _add_rows_of_each(out_TD: Tensor, y_RD: Tensor, token_of: list[int]) -> Tensor:
    """Add each token's rows to its sum, in their order: as index_add_, which takes longer to start its threads."""
    rows_of: list[list[int]] = [[] for _ in range(len(out_TD))]
    for row, token in enumerate(token_of):
        rows_of[token].append(row)
    most, none = max(map(len, rows_of)), len(y_RD)
    index_TN = [[*rows, *[none] * (most - len(rows))] for rows in rows_of]
    padded_RD = torch.cat((y_RD, y_RD.new_zeros(1, y_RD.shape[1]))) if any(none in rows for rows in index_TN) else y_RD
    for rows_TD in padded_RD[torch.tensor(index_TN, device=y_RD.device).t()]:
        out_TD += rows_TD
    return out_TD


def _product_of_each(rows_RI: Tensor, weight_EOI: Tensor, rows_of: dict[int, int]) -> Tensor:
    """Each expert's rows times its weight; rows_of: expert → number of its rows, in their order."""
    parts = rows_RI.split_with_sizes(list(rows_of.values()))
    return torch.cat([linear_forward(part, weight_EOI[expert]) for part, expert in zip(parts, rows_of)])


def backward(
    grad_TD: Tensor, x_TD: Tensor, w1_EHD: Tensor, w2_EDF: Tensor, indices_TK: Tensor, s_TK: Tensor, pre_RH: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, both weights and the gates."""
    groups = group_rows.reference(indices_TK, len(w1_EHD), len(pre_RH))
    score_R1 = wide(s_TK).flatten()[groups.order_R].unsqueeze(1)
    grad_x = torch.zeros_like(x_TD, dtype=score_R1.dtype)
    grad_w1, grad_w2, grad_s_R = torch.zeros_like(w1_EHD), torch.zeros_like(w2_EDF), torch.empty_like(score_R1[:, 0])
    for expert, span, token_N in _experts_with_rows(groups, indices_TK.shape[1]):
        grad_ND, dtype = grad_TD.index_select(0, token_N), x_TD.dtype
        unscaled_NF = wide(linear_grad_input(grad_ND, w2_EDF[expert]))
        scaled_NF, grad_pre_NH, grad_s_R[span] = weighted_swiglu_backward(unscaled_NF, pre_RH[span], score_R1[span])
        linear_grad_weight(grad_ND, scaled_NF.to(dtype), out=grad_w2[expert])
        grad_pre_NH = grad_pre_NH.to(dtype)
        linear_grad_weight(grad_pre_NH, x_TD.index_select(0, token_N), out=grad_w1[expert])
        grad_x.index_add_(0, token_N, wide(linear_grad_input(grad_pre_NH, w1_EHD[expert])))
    grad_s = grad_s_R.new_zeros(s_TK.numel())
    grad_s[groups.order_R] = grad_s_R
    return grad_x.to(x_TD.dtype), grad_w1, grad_w2, grad_s.view_as(s_TK).to(s_TK.dtype)


def _experts_with_rows(groups: Groups, active: int) -> Iterator[tuple[int, slice, Tensor]]:
    """Each expert that has rows: its number, its rows, and the token of each of them [N]."""
    token_R, first = groups.order_R // active, 0
    for expert, end in enumerate(groups.ends_E.tolist()):
        if first < end:
            yield expert, slice(first, end), token_R[first:end]
        first = end
