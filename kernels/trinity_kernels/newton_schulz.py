"""The Newton-Schulz iteration: X ← aX + b(XXᵀ)X + c(XXᵀ)²X, with a triple (a, b, c) for each step.

It maps every singular value σ of X to a·σ + b·σ³ + c·σ⁵ and keeps the singular vectors. The caller chooses triples that
drive σ to 1 (`trinity.optim.newton_schulz`). Nothing is saved: there is no gradient.
Triton (newton_schulz_triton.py): computes half the tiles of symmetric products, and a Gram form for flat matrices.

Shapes: N matrices in a batch, each of m rows and n columns; k the shorter side.
"""

import torch
from torch import Tensor

from trinity_kernels.linear import product, takes_onednn
from trinity_kernels.op import Op, interpreted

Triple = tuple[float, float, float]


def _newton_schulz(y_Nmn: Tensor, triples: list[Triple]) -> Tensor:
    """One step of the iteration per triple, on each matrix.

    Args:
        y_Nmn: [N, m, n], each matrix divided by its Frobenius norm, in the dtype of the products; N may be 0. A zero
            matrix gives zeros.
        triples: (a, b, c) of each step.
    Returns:
        [N, m, n], same dtype.
    """
    m, n = y_Nmn.shape[1:]
    if takes_onednn(y_Nmn):
        return torch.stack([_one_matrix(y_mn, triples) for y_mn in y_Nmn]) if len(y_Nmn) else y_Nmn
    for a, b, c in triples:
        # (XXᵀ)X = X(XᵀX): the products use the shorter side, which equals transposing a tall matrix
        gram_Nkk = y_Nmn.mT @ y_Nmn if m > n else y_Nmn @ y_Nmn.mT
        poly_Nkk = torch.baddbmm(gram_Nkk, gram_Nkk, gram_Nkk, beta=b, alpha=c)
        left, right = (y_Nmn, poly_Nkk) if m > n else (poly_Nkk, y_Nmn)
        y_Nmn = torch.baddbmm(y_Nmn, left, right, beta=a)
    return y_Nmn


def _one_matrix(y_mn: Tensor, triples: list[Triple]) -> Tensor:
    """The same for one matrix, by trinity_kernels.linear's product: torch's batched products are always MKL's."""
    tall = y_mn.shape[0] > y_mn.shape[1]
    for a, b, c in triples:
        gram_kk = product(y_mn.t(), y_mn) if tall else product(y_mn, y_mn.t())
        poly_kk = product(gram_kk, gram_kk).mul_(c).add_(gram_kk, alpha=b)
        left, right = (y_mn, poly_kk) if tall else (poly_kk, y_mn)
        y_mn = product(left, right).add_(y_mn, alpha=a)
    return y_mn


def refuses(y_Nmn: Tensor, triples: list[Triple]) -> str | None:
    """Why Triton does not support the call (float64, fp32 on a GPU, cubic steps, rows unfit for TMA), or None."""
    if y_Nmn.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes 16-bit and 32-bit numbers, not {y_Nmn.dtype}"
    if y_Nmn.dtype == torch.float32 and not interpreted():
        return "products in fp32 use no tensor core, and torch's are faster there"
    if any(c == 0 for _, _, c in triples):
        return "a step has c = 0, and it divides by c"
    m, n = y_Nmn.shape[1:]
    for width in (n, min(m, n)):  # of X's rows and of XXᵀ's
        if width * y_Nmn.element_size() % 16:
            return f"rows of {width} numbers are no multiple of 16 bytes"
    return None


newton_schulz = Op(_newton_schulz, "trinity_kernels.newton_schulz_triton:newton_schulz", refuses)
