"""The part that all engines share: gather the rows of the experts, and sum each token's weighted rows.

    x_TD ─gather─► x_RD ─linear─► [gate; up] ─silu(gate)∘up─► ─linear─► y_RD ─weigh─► out_TD

Saved for backward: by this file the grouping, y_RD and the gates; by `linear` the gathered rows and the activations; by
torch gate and up. So a row keeps at least 2·D + 4·F numbers, where trinity_kernels.experts keeps 2·F.

Shapes: T tokens, K active experts, R rows sorted by expert, D width, F expert width, E experts, O and I a weight's
output and input width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity_kernels.grouping import group_rows
from trinity_kernels.norm import wide

Linear = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows_RI, weight_EOI, ends_E) → [R, O], differentiable: each expert's rows times its weight transposed; R > 0."""


@torch.compiler.disable  # the packages' products have no fake, and the fake of torch's grouped_mm refuses these
def expert_mlp_by(
    linear: Linear, x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, indices_TK: Tensor, s_TK: Tensor,
    rows: int | None,
) -> Tensor:  # fmt: skip
    """trinity_kernels.expert_mlp with `linear` as its two products.

    Args:
        linear: see Linear.
        x_TD … rows: as trinity_kernels.expert_mlp takes them.
    Returns:
        [T, D], x's dtype; the sum over K is in fp32. Gradients without rows are zeros, never None.
    """
    rows = indices_TK.numel() if rows is None else rows
    if not rows:  # the engines need at least one row
        return _NoRows.apply(x_TD, gate_up_E2FD, down_EDF, s_TK)
    groups = group_rows(indices_TK, len(gate_up_E2FD), rows)
    x_RD = _Gather.apply(x_TD, *groups)
    gate_RF, up_RF = linear(x_RD, gate_up_E2FD.flatten(1, 2), groups.ends_E).chunk(2, dim=-1)
    return _WeightedSum.apply(linear(F.silu(gate_RF) * up_RF, down_EDF, groups.ends_E), s_TK, *groups)


class _NoRows(torch.autograd.Function):
    """An output of zeros, with gradients of zeros."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, *others)
        return torch.zeros_like(x_TD)

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(x) for x in ctx.saved_tensors)


class _Gather(torch.autograd.Function):
    """One row per choice; backward adds each token's gradients in the order of its choices."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, order_R: Tensor, place_TK: Tensor, _ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return x_TD.index_select(0, order_R // place_TK.shape[1])

    @staticmethod
    def backward(ctx, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        (place_TK,) = ctx.saved_tensors
        return _sum_per_token(grad_RD, place_TK).to(grad_RD.dtype), None, None, None


class _WeightedSum(torch.autograd.Function):
    """Σ_k s_tk · row in fp32. Saves the rows in their own dtype."""

    @staticmethod
    def forward(ctx, y_RD: Tensor, s_TK: Tensor, order_R: Tensor, place_TK: Tensor, _ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(y_RD, s_TK, order_R)
        return _sum_per_token(y_RD, place_TK, s_TK).to(y_RD.dtype)

    @staticmethod
    def backward(ctx, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        y_RD, s_TK, order_R = ctx.saved_tensors
        grad_RD = wide(grad_TD.index_select(0, order_R // s_TK.shape[1]))
        grad_s = torch.zeros_like(s_TK, dtype=grad_RD.dtype).view(-1)
        grad_s[order_R] = (grad_RD * y_RD).sum(dim=1)
        grad_y = grad_RD.mul_(wide(s_TK).flatten()[order_R].unsqueeze(1)).to(y_RD.dtype)
        return grad_y, grad_s.view_as(s_TK).to(s_TK.dtype), None, None, None


def _sum_per_token(rows_RD: Tensor, place_TK: Tensor, s_TK: Tensor | None = None) -> Tensor:
    """[T, D] in fp32 or float64; a choice of −1 adds nothing, for any gate."""
    skipped_TK = place_TK < 0
    rows_TKD = wide(rows_RD.index_select(0, place_TK.clamp_min(0).flatten())).view(*place_TK.shape, -1)
    if len(rows_RD) < place_TK.numel():
        rows_TKD = rows_TKD.masked_fill(skipped_TK.unsqueeze(-1), 0)
    if s_TK is None:
        return rows_TKD.sum(dim=1)
    # squeeze_ returns no view
    return torch.bmm(wide(s_TK).masked_fill(skipped_TK, 0).unsqueeze(1), rows_TKD).squeeze_(1)
