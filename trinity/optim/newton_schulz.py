"""Newton-Schulz iteration: the nearest semi-orthogonal matrix, approximately, by matrix products alone.

X = U Σ Vᵀ is first divided by its Frobenius norm, so every singular value σ lies in [0, 1]. Each step then computes
X ← aX + b(XXᵀ)X + c(XXᵀ)²X, which keeps U and Vᵀ and maps every σ to a·σ + b·σ³ + c·σ⁵. A set of coefficients is a list
of triples (a, b, c), one per step. It drives every σ that is not tiny towards 1, and so X towards U Vᵀ.

Range of σ after five steps (measured in float64 on a grid of four million values; a test checks it):

| set           | σ in [0.01, 1]  | σ in [0.003, 1] | smaller σ: at most the same, and about |
|---------------|-----------------|-----------------|----------------------------------------|
| dion          | 0.977 to 1.032  | 0.977 to 1.146  | 493 σ                                  |
| keller        | 0.681 to 1.135  | 0.681 to 1.203  | 485 σ                                  |
| polar_express | 0.870 to 1.124  | 0.870 to 1.124  | 976 σ                                  |

Only polar_express converges to 1 with more steps (1e-12 away after eight, for σ ≥ 1e-3); dion and keller trade that
for a steeper start. Products in bf16 exceed the bounds by at most 0.02 (0.012 measured).

Shapes: N matrices in a batch, each of m rows and n columns.
"""

from typing import Literal

import torch
from torch import Tensor

from trinity.errors import UserError
from trinity_kernels.newton_schulz import Triple, newton_schulz

# Polar Express (arXiv 2505.16932, algorithm 1): the optimal quintic of each step, for σ from 1e-3 to 1. The paper
# divides σ by 1.01 in all steps but the last, since a σ that rounding pushed above 1 would otherwise diverge.
_POLAR_EXPRESS: list[Triple] = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
]

# One triple per step; past the end the last one repeats.
COEFFICIENTS: dict[str, list[Triple]] = {
    # of the Dion repository, on which the report's Muon is based
    "dion": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
    # Keller Jordan's, of the original Muon
    "keller": [(3.4445, -4.7750, 2.0315)],
    "polar_express": [*((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _POLAR_EXPRESS), (1.875, -1.25, 0.375)],
}

# The smallest divisor: a matrix with a smaller norm comes out smaller than orthogonal. Below about 1e-15 the squares of
# fp32 elements underflow, the norm is 0, and dividing by it would give infinities.
_SMALLEST_NORM = 1e-14


def orthogonalize(
    x: Tensor,
    coefficients: str = "dion",
    steps: int = 5,
    dtype: torch.dtype = torch.bfloat16,
    kernel: Literal["auto", "triton", "reference"] = "auto",
) -> Tensor:
    """The semi-orthogonal matrix nearest to each matrix of x (U Vᵀ of its SVD), approximately.

    Args:
        x: [..., m, n], floating point; each matrix is treated alone. A zero matrix gives zeros.
        coefficients: name of a set in COEFFICIENTS.
        steps: number of steps, at least 1.
        dtype: of the matrix products; the norm is computed in fp32 at least.
        kernel: implementation of the iteration; auto is Triton on a GPU if it supports the shape and dtype.
    Returns:
        [..., m, n] in x's dtype, a new tensor; its singular values lie within the bounds of the module's table.
    Raises:
        UserError: an unknown set, or steps < 1.
        ValueError: kernel="triton" where Triton cannot be used.
    """
    triples = coefficient_steps(coefficients, steps)
    *batch, m, n = x.shape
    x_Nmn = x.reshape(-1, m, n)
    y_Nmn = (x_Nmn / _frobenius_norm(x_Nmn).clamp_min(_SMALLEST_NORM)).to(dtype)
    return newton_schulz(y_Nmn, triples, kernel=kernel).to(x.dtype).view(*batch, m, n)


def newton_schulz_flops(rows: int, columns: int, steps: int) -> int:
    """Floating-point operations on one matrix: two products k×k×n and one k×k×k per step, where k ≤ n are its sides."""
    k, n = sorted((rows, columns))
    return steps * (2 * 2 * k * k * n + 2 * k**3)


def coefficient_steps(coefficients: str, steps: int) -> list[Triple]:
    """The triple of each step; past the end of the set, its last triple repeats.

    Raises:
        UserError: an unknown set, or steps < 1.
    """
    if coefficients not in COEFFICIENTS:
        known = ", ".join(COEFFICIENTS)
        raise UserError(f"optim.muon.coefficients={coefficients!r} is not a known set; use one of {known}")
    if steps < 1:
        raise UserError(f"optim.muon.steps={steps} would not orthogonalise; use 1 or more (5 is usual)")
    triples = COEFFICIENTS[coefficients]
    return [triples[min(step, len(triples) - 1)] for step in range(steps)]


def _frobenius_norm(x_Nmn: Tensor) -> Tensor:
    """Norms [N, 1, 1] in fp32 (float64 for float64); rows first, since long fp32 sums lose digits on CPU."""
    dtype = torch.promote_types(x_Nmn.dtype, torch.float32)
    rows_Nm1 = torch.linalg.vector_norm(x_Nmn, dim=-1, keepdim=True, dtype=dtype)
    return torch.linalg.vector_norm(rows_Nm1, dim=-2, keepdim=True)
