"""Each token's sum over its rows, and another tensor: the end of an exchange of tokens between ranks.

y_t = plus_t + Σ_k rows[place_tk], in fp32, in the order of k, without the places of −1; rounded once.

Nothing is saved: the caller differentiates (the adjoint copies each token's gradient to its rows).
Triton (combine_kernel in experts_triton.py, which also ends the routed experts): reads each row once and writes no
other sum than the result.

Shapes: T tokens, K places of a token, R rows, D width.
"""

from functools import cached_property

import torch
from torch import Tensor

from trinity_kernels.experts import sum_of_rows
from trinity_kernels.op import Op


class Places:
    """The places of each token's rows, for any number of sums over them.

    Args:
        place_TK: [T, K] integers, contiguous: each of the R rows once, and −1.
        rows: R.
    """

    def __init__(self, place_TK: Tensor, rows: int) -> None:
        self.place_TK, self.rows = place_TK, rows

    @cached_property
    def in_order(self) -> tuple[Tensor, Tensor]:
        """The places [R] of the first token's rows, then of the second's, and the number of rows of each token [T]."""
        place, is_row_TK = self.place_TK.flatten(), self.place_TK >= 0
        # static: the host does not wait for the number of rows
        index_R = torch.nonzero_static(is_row_TK.flatten(), size=self.rows).squeeze(1)
        return place[index_R], is_row_TK.sum(dim=1)


def _combine(rows_RD: Tensor, places: Places, plus_TD: Tensor | None = None) -> Tensor:
    """Each token's sum over its rows, not differentiable.

    Args:
        rows_RD: [R, D] floating point; R may be 0.
        places: of the R rows.
        plus_TD: [T, D], the rows' dtype, added to the sums; None: nothing is added.
    Returns:
        [T, D], the rows' dtype, summed in fp32 (float64 stays float64); plus or zeros for a token without rows.
    """
    sums_TD = sum_of_rows(rows_RD, *places.in_order)
    if plus_TD is not None:
        sums_TD += plus_TD
    return sums_TD.to(rows_RD.dtype)


def _refuses(rows_RD: Tensor, *_: object, **__: object) -> str | None:
    if rows_RD.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes 16-bit and 32-bit numbers, not {rows_RD.dtype}"
    return None


combine = Op(_combine, "trinity_kernels.experts_triton:combine_rows", _refuses)
