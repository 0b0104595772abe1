"""Each token's sum over its rows, and another tensor: the end of an exchange of tokens between ranks.

y_t = plus_t + Σ_k rows[place_tk], in fp32, in the order of k, without the places of −1; rounded once.

Nothing is saved: the caller differentiates (the adjoint copies each token's gradient to its rows).
Triton (combine_kernel in experts_triton.py, which also ends the routed experts): reads each row once and writes no
other sum than the result.

Shapes: T tokens, K places of a token, R rows, D width.
"""

import torch
from torch import Tensor

from trinity_kernels.experts import sum_of_rows
from trinity_kernels.op import Op


def _combine(rows_RD: Tensor, place_TK: Tensor, plus_TD: Tensor | None = None) -> Tensor:
    """Each token's sum over its rows, not differentiable.

    Args:
        rows_RD: [R, D] floating point, contiguous; R may be 0.
        place_TK: [T, K] integers, the places of each token's rows, or −1; each of the R rows is at one place.
        plus_TD: [T, D], the rows' dtype, added to the sums; None: nothing is added.
    Returns:
        [T, D], the rows' dtype, summed in fp32 (float64 stays float64); plus or zeros for a token without rows.
    """
    place, is_row_TK = place_TK.flatten(), place_TK >= 0
    index_R = torch.nonzero_static(is_row_TK.flatten(), size=len(rows_RD)).squeeze(1)  # static: the host does not wait
    sums_TD = sum_of_rows(rows_RD, place[index_R], is_row_TK.sum(dim=1))
    if plus_TD is not None:
        sums_TD += plus_TD
    return sums_TD.to(rows_RD.dtype)


def _refuses(rows_RD: Tensor, *_: object, **__: object) -> str | None:
    if rows_RD.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes 16-bit and 32-bit numbers, not {rows_RD.dtype}"
    return None


combine = Op(_combine, "trinity_kernels.experts_triton:combine_rows", _refuses)
