"""Two signal-to-noise ratios of a matrix from its singular values S: Spectrum's, and one with the edge of noise.

With n ≤ m the matrix's sides, β = n/m, and q the quantiles of S:

    spectrum  σ = (q75 − q25)/1.349,  t = σ·(1 + √β),  Σ S above t / Σ S up to t / max S     (arXiv 2406.06623's script)
    mp        σ = median S / √(m·μ(β)),  t = the edge of noise,  Σ S² above t / Σ S² up to t

A matrix of independent entries with variance σ² has the singular values of Marchenko and Pastur's law: S²/m is between
σ²(1 − √β)² and σ²(1 + √β)², with median σ²·μ(β), so the edge is σ·(√n + √m) for large matrices. The largest value of
noise fluctuates about it by Tracy and Widom's law (Johnstone 2001), and above the edge alone are one or two values of a
quarter of all noise matrices. So t is the 99 % point of the largest value:

    t² = σ²·(a² + 2.02·a·(1/√(n − 1) + 1/√m)^⅓),  a = √(n − 1) + √m

So `mp` counts what noise of this size has not, and multiplying the matrix by a number does not change it. The threshold
of `spectrum` takes the spread of S for the deviation of the entries, which it is not: it calls a part of pure noise
signal, and the score depends on the matrix's scale (README.md).
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_POINTS = 1 << 14  # of the integral of the law: its median is then exact to 1e-8

_TRACY_WIDOM = 2.0234  # 99 % point of Tracy and Widom's law for real matrices


class Score(NamedTuple):
    """The scores of one matrix.

    spectrum: as the paper's script has it; not scale-free.
    mp: energy above the edge of noise over the rest; infinite for a matrix whose rank is less than half of its size.
    rank: number of singular values above that edge.
    """

    spectrum: float
    mp: float
    rank: int


def score_matrix(weight: Tensor) -> Score:
    """Both scores of a matrix [n, m] on its device, from fp32 singular values (float64 for a float64 matrix).

    A vector is a matrix of one row: its `mp` is 0, and its `spectrum` 1.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    s = torch.linalg.svdvals(weight)
    rows, columns = weight.shape
    mp, rank = marchenko_pastur_score(s, rows, columns)
    return Score(spectrum_score(s, rows, columns), mp, rank)


def spectrum_score(s: Tensor, rows: int, columns: int) -> float:
    """The score of Spectrum's script, in the dtype of the singular values, descending; 0 for a matrix of zeros."""
    if not s[0]:
        return 0.0
    quartiles = torch.quantile(s, torch.tensor([0.25, 0.75], dtype=s.dtype, device=s.device))
    sigma = (quartiles[1] - quartiles[0]) / 1.349
    beta = min(rows, columns) / max(rows, columns)
    above = s > sigma * (1 + math.sqrt(beta))
    signal, noise = s[above].sum(), s[~above].sum()
    return (signal / (noise if noise else 1.0) / s[0]).item()


def marchenko_pastur_score(s: Tensor, rows: int, columns: int) -> tuple[float, int]:
    """(Σ S² above the edge of noise / Σ S² up to it, the number above it); see the module's docstring."""
    s = s.double()
    small, large = min(rows, columns), max(rows, columns)
    if small == 1:
        return 0.0, 0
    sigma = torch.quantile(s, 0.5) / math.sqrt(large * marchenko_pastur_median(small / large))
    above = s > sigma * noise_edge(small, large)
    signal, noise = s[above].square().sum().item(), s[~above].square().sum().item()
    return (signal / noise if noise else math.inf if signal else 0.0), int(above.sum())


def noise_edge(small: int, large: int) -> float:
    """The 99 % point of the largest singular value of a matrix [small, large] of independent entries of variance 1."""
    a, b = math.sqrt(small - 1), math.sqrt(large)
    return math.sqrt((a + b) ** 2 + _TRACY_WIDOM * (a + b) * (1 / a + 1 / b) ** (1 / 3))


@lru_cache(maxsize=256)
def marchenko_pastur_median(beta: float) -> float:
    """μ(β), the median of Marchenko and Pastur's law with variance 1, for 0 < β ≤ 1.

    With x = 1 + β + 2√β·cos φ, the density √((b − x)(x − a))/(2πβx) dx becomes 2 sin²φ/(πx) dφ, which is smooth.
    """
    phi = (np.arange(_POINTS) + 0.5) * (math.pi / _POINTS)
    x = 1 + beta + 2 * math.sqrt(beta) * np.cos(phi)
    upper = np.cumsum(2 * np.sin(phi) ** 2 / x) / _POINTS  # of the mass above the right end of each interval of φ
    return float(1 + beta + 2 * math.sqrt(beta) * math.cos(np.interp(0.5, upper, phi + math.pi / _POINTS / 2)))
