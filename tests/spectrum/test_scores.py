"""Both scores against transcriptions in numpy, and `mp` against matrices of known rank and pure noise."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from trinity.spectrum.modules import find_modules, open_weights
from trinity.spectrum.scores import marchenko_pastur_median, score_matrix


def spectrum_in_numpy(weight: np.ndarray) -> float:
    """The published script's steps, one for one, in float64: its fp32 is the same to rounding."""
    singular = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
    deviation = (np.quantile(singular, 0.75) - np.quantile(singular, 0.25)) / 1.349
    n, m = weight.shape
    ratio = n / m if n < m else m / n
    threshold = deviation * np.sqrt((1 + np.sqrt(ratio)) ** 2)
    noise = singular[singular <= threshold].sum()
    return singular[singular > threshold].sum() / (noise if noise != 0 else 1.0) / singular[0]


def test_spectrum_of_every_module(folder: Path) -> None:
    """On every matrix and gain of a model: 1e-5 is a hundred times the rounding of fp32 singular values."""
    source = open_weights(str(folder))
    tensors = [tensor for module in find_modules(source) for tensor in module.tensors]
    assert sum(len(source.entries[tensor].shape) == 2 for tensor in tensors) > 70
    for tensor in tensors:
        weight = source.read(tensor, 0, source.rows(tensor))
        assert score_matrix(weight).spectrum == pytest.approx(spectrum_in_numpy(weight.numpy()), rel=1e-5), tensor


@pytest.mark.parametrize("beta", [0.01, 0.125, 0.5, 0.9, 1.0])
def test_median_of_the_law(beta: float) -> None:
    """Half of the mass is below it: the density itself, summed over x = low + t².

    With 2·10⁵ intervals of t, where it is smooth, the midpoint rule is right to 1e-9.
    """
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    end = math.sqrt(marchenko_pastur_median(beta) - low)
    t = (np.arange(200_000) + 0.5) * (end / 200_000)
    x = low + t**2
    density = np.sqrt((high - x) * (x - low)) / (2 * math.pi * beta * x)
    assert (density * 2 * t).sum() * (end / 200_000) == pytest.approx(0.5, abs=1e-7)


@pytest.mark.parametrize("shape", [(256, 256), (512, 200), (128, 640)])
@pytest.mark.parametrize("rank", [0, 5, 20])
def test_planted_ranks_are_found(shape: tuple[int, int], rank: int) -> None:
    """Noise of variance σ² plus `rank` directions at twice the edge: exactly these are above it.

    Of noise, one matrix in a hundred has a value above its 99 % point; the seeds are fixed.
    """
    generator = torch.Generator().manual_seed(rank)
    rows, columns = shape
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator)).Q[:, :rank]
    right = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q[:, :rank]
    edge = math.sqrt(rows) + math.sqrt(columns)
    weight = torch.randn(shape, generator=generator) + 2 * edge * left @ right.T
    score = score_matrix(0.02 * weight)
    assert score.rank == rank
    assert (score.mp > 0) == (rank > 0)


def test_mp_has_no_scale_and_no_side() -> None:
    """Neither a factor, here a power of two, nor transposing changes it; Spectrum's score has the scale in it."""
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)) + 1
    score, scaled, turned = (score_matrix(w) for w in (weight, 8 * weight, weight.T))
    assert score.rank == 1
    assert scaled.mp == pytest.approx(score.mp, rel=1e-12)
    assert scaled.spectrum == pytest.approx(score.spectrum / 8, rel=1e-6)
    assert turned.mp == pytest.approx(score.mp, rel=1e-5)


def test_special_matrices() -> None:
    """Zeros, one direction and nothing else, a vector, and bf16."""
    assert score_matrix(torch.zeros(4, 6)) == (0.0, 0.0, 0)
    one = torch.zeros(6, 8, dtype=torch.float64)
    one[2, 3] = 5
    assert score_matrix(one).mp == math.inf
    assert score_matrix(one).rank == 1
    assert score_matrix(torch.arange(1.0, 9.0).unsqueeze(0)) == (pytest.approx(1.0), 0.0, 0)
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert score_matrix(weight) == score_matrix(weight.float())


def test_noise_is_rarely_signal() -> None:
    """Of 200 matrices of noise 2 are expected above the 99 % point; 8 or more would be by chance once in 10³ runs."""
    generator = torch.Generator().manual_seed(0)
    ranks = [score_matrix(torch.randn(32, 48, generator=generator)).rank for _ in range(200)]
    assert sum(rank > 0 for rank in ranks) < 8
