"""Routed experts merged from N frozen models: rows of tokens are scaled by the coefficients of their own expert.

With e the expert of row r:

    pre_r  = Σ_i W1_ie·(c_ie ∘ x_r)     for gate and up, each with coefficients of its own
    y_r    = Σ_i W2_ie·(d_ie ∘ swiglu(pre_r))

These are grouped products with frozen weights. Their backward is one grouped product: no gradient of a weight exists.

Saved for backward: the rows before they are scaled, the pre-activations, and the order of rows.

Shapes: T tokens, D width, E experts, F expert width, K active experts, R rows sorted by expert, N models.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import trinity_kernels
from trinity.dam.layers import Merged, Mixing, scaled, total
from trinity.models.moe import Experts, whole_weight
from trinity_kernels.grouped_gemm import grouped_matmul
from trinity_kernels.grouping import group_rows
from trinity_kernels.norm import wide

MATRICES = ("gate", "up", "down")


class MergedExperts(Merged):
    """The experts module of trinity.models.moe, merged.

    Attributes:
        local_part: see Experts.
    """

    def __init__(self, layer: Experts, mixing: Mixing, part: str) -> None:
        super().__init__(mixing, part)
        # other engines have no such products
        self.kernel = layer.kernel if layer.kernel in ("auto", "triton", "reference") else "auto"
        experts, _, hidden, width = layer.gate_up.shape
        for name in MATRICES:
            shape = (width, hidden) if name == "down" else (hidden, width)
            self.add_weights(name, experts, *shape)
            self.register_parameter(f"{name}_coefficients", mixing.coefficients(experts, shape[1]))
        self.local_part: Callable[[Tensor, bool], Tensor] = whole_weight

    def forward(
        self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor, rows: int | None = None, plus_TD: Tensor | None = None
    ) -> Tensor:
        """See Experts.forward."""
        rows = indices_TK.numel() if rows is None else rows
        experts = len(self.local_part(self.get_parameter("gate_0"), False))
        order_R, place_TK, ends_E = group_rows(indices_TK, experts, rows)
        order_R, place_TK = order_R.long(), place_TK.long()
        expert_R = indices_TK.flatten()[order_R]
        x_RD = rows_at(order_R // indices_TK.shape[1], x_TD)
        pre = torch.cat([self._product(name, x_RD, expert_R, ends_E) for name in ("gate", "up")], dim=-1)
        y_RD = self._product("down", trinity_kernels.swiglu(pre), expert_R, ends_E)
        sums_TD = _sum_per_token(y_RD, place_TK, gates_TK)
        return (sums_TD if plus_TD is None else sums_TD + plus_TD).to(x_TD.dtype)

    def _product(self, name: str, x_RI: Tensor, expert_R: Tensor, ends_E: Tensor) -> Tensor:
        """Σ_i W_ie·(c_ie ∘ x) for each row, [R, O]."""
        coefficients_ENI = self.local_part(getattr(self, f"{name}_coefficients"), False)
        products = []
        for weight_EOI, c_EI in self.terms(name, coefficients_ENI.transpose(0, 1)):
            c_RI = None if c_EI is None else rows_at(expert_R, c_EI)
            weight_EOI = self.local_part(weight_EOI, False)
            products.append(_FrozenProduct.apply(scaled(x_RI, c_RI), weight_EOI, ends_E, self.kernel))
        return total(products)


class _FrozenProduct(torch.autograd.Function):
    """grouped_linear for a weight without a gradient."""

    @staticmethod
    def forward(ctx, x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, kernel: str) -> Tensor:
        ctx.save_for_backward(weight_EOI, ends_E)
        ctx.kernel = kernel
        return grouped_matmul(x_RI.contiguous(), weight_EOI, ends_E, True, kernel=kernel)

    @staticmethod
    def backward(ctx, grad_RO: Tensor) -> tuple[Tensor, None, None, None]:
        weight_EOI, ends_E = ctx.saved_tensors
        return grouped_matmul(grad_RO.contiguous(), weight_EOI, ends_E, False, kernel=ctx.kernel), None, None, None


def _sum_per_token(y_RD: Tensor, place_TK: Tensor, gates_TK: Tensor) -> Tensor:
    """Σ_k gate·row for each token, in fp32 at least; a place of −1 is a row of zeros."""
    rows = torch.cat((y_RD, y_RD.new_zeros(1, y_RD.shape[1])))
    rows_TKD = rows_at(place_TK % len(rows), wide(rows))
    return (rows_TKD * wide(gates_TK).unsqueeze(-1)).sum(dim=1)


def rows_at(index: Tensor, rows_RD: Tensor) -> Tensor:
    """rows_RD[index], whose gradient adds the rows of an index in order.

    The gradient of indexing adds in the order in which a CPU's threads arrive, that of index_select in any order on a
    GPU: then two runs differ in the last bit. The gradient of an embedding has one order on a CPU (not tried on a GPU).

    Args:
        index: int64, none negative.
        rows_RD: the rows.
    Returns:
        [..., D].
    """
    return F.embedding(index, rows_RD)
