"""orthogonalize against the SVD, and each set of coefficients against the bounds of its table."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trinity.errors import UserError
from trinity.optim.newton_schulz import COEFFICIENTS, coefficient_steps, newton_schulz_flops, orthogonalize

# (least, largest) for σ ≥ 0.01 and σ ≥ 0.003, and the slope at 0: the table in the module's docstring.
BOUNDS = {
    "dion": ((0.977, 1.032), (0.977, 1.146), 493),
    "keller": ((0.681, 1.135), (0.681, 1.203), 485),
    "polar_express": ((0.870, 1.124), (0.870, 1.124), 976),
}
SHAPES = [(8, 8), (6, 20), (20, 6), (1, 7), (7, 1), (3, 8, 5), (2, 3, 4, 9)]


def polynomial(sigma: np.ndarray, coefficients: str, steps: int = 5) -> np.ndarray:
    """Singular values after the steps, in float64."""
    triples = COEFFICIENTS[coefficients]
    for step in range(steps):
        a, b, c = triples[step] if step < len(triples) else triples[-1]
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


def matrices(shape: tuple[int, ...], least: float = 0.1) -> Tensor:
    """float64 matrices with singular values evenly spaced from `least` to 1."""
    torch.manual_seed(sum(shape))
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    return u * torch.linspace(1.0, least, u.shape[-1], dtype=torch.float64) @ vh


def test_dion_and_keller_are_the_published_triples() -> None:
    """A second copy of the numbers: the bounds alone would not reveal a wrong digit."""
    assert COEFFICIENTS["keller"] == [(3.4445, -4.7750, 2.0315)]
    a, b, c = zip(*COEFFICIENTS["dion"])
    assert a == (4.0848, 3.9505, 3.7418, 2.8769, 2.8366)
    assert b == (-6.8946, -6.3029, -5.5913, -3.1427, -3.0525)
    assert c == (2.9270, 2.6377, 2.3037, 1.2046, 1.2012)


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_table_of_bounds_holds_and_is_tight(coefficients: str) -> None:
    """Two million values evenly in σ and as many in log σ. The bounds have three digits and may not be looser."""
    sigma = np.concatenate([np.logspace(-9, 0, 2_000_000), np.linspace(1e-9, 1, 2_000_000)])
    result = polynomial(sigma, coefficients)
    *bounds, slope = BOUNDS[coefficients]
    for start, (least, largest) in zip((0.01, 0.003), bounds):
        inside = result[sigma >= start]
        assert least <= inside.min() < least + 1e-3
        assert largest - 1e-3 < inside.max() <= largest
    assert result.min() > 0
    assert result.max() <= bounds[1][1]
    assert result[0] / sigma[0] == pytest.approx(slope, abs=0.5)


def test_polar_express_is_optimal_step_by_step() -> None:
    """The property of the paper's optimal polynomials: each maps its interval symmetrically about 1.

    Starting from [1e-3, 1], without the division by 1.01. A wrong digit among the first ten breaks it (1e-11 is the
    rounding of the published numbers).
    """
    least, largest = 1e-3, 1.0
    for step, (a, b, c) in enumerate(COEFFICIENTS["polar_express"][:-1]):
        a, b, c = a * 1.01, b * 1.01**3, c * 1.01**5
        turning = np.roots([5 * c, 0, 3 * b, 0, a])
        inside = turning[(turning.imag == 0) & (turning.real > least) & (turning.real < largest)].real
        reached = [a * x + b * x**3 + c * x**5 for x in (least, largest, *inside)]
        least, largest = min(reached), max(reached)
        assert least + largest == pytest.approx(2.0, rel=0, abs=1e-11), f"step {step}"
    assert largest - 1 < 2e-9


def test_polar_express_converges() -> None:
    """The last triple is the classical quintic with fixed point 1; the paper's range starts at 1e-3."""
    assert np.abs(polynomial(np.linspace(1e-3, 1, 100_000), "polar_express", 8) - 1).max() < 1e-12


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_maps_singular_values_by_the_polynomial(shape: tuple[int, ...], coefficients: str) -> None:
    """y = U p(σ/‖x‖) Vᵀ; rounding of 2⁻⁵³ grows by at most the slopes, below 1e3: 1e-12."""
    x = 3.7 * matrices(shape)
    u, sigma, vh = torch.linalg.svd(x, full_matrices=False)
    mapped = polynomial((sigma / sigma.square().sum(-1, keepdim=True).sqrt()).numpy(), coefficients)
    y = orthogonalize(x, coefficients, dtype=torch.float64)
    torch.testing.assert_close(y, u * torch.from_numpy(mapped).unsqueeze(-2) @ vh, rtol=0, atol=1e-12)
    least, largest = BOUNDS[coefficients][0]  # all σ here are above 0.01 of the norm
    away = torch.linalg.matrix_norm(y - u @ vh, ord=2)
    assert away.max() <= max(1 - least, largest - 1)


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_lower_precision_stays_near_the_polar_factor(shape, coefficients, dtype, slack) -> None:
    """bf16 rounds each of 15 products to 2⁻⁹; 0.012 is the most measured over many matrices."""
    x = matrices(shape)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalize(x.float(), coefficients, dtype=dtype)
    assert y.dtype == torch.float32
    assert y.shape == x.shape
    least, largest = BOUNDS[coefficients][0]
    away = torch.linalg.matrix_norm(y.double() - u @ vh, ord=2)
    assert away.max() <= max(1 - least, largest - 1) + slack


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_result_has_the_dtype_of_x_and_the_precision_of_dtype(dtype: torch.dtype) -> None:
    x = matrices((4, 6)).to(dtype)
    in_bf16, in_fp32 = orthogonalize(x), orthogonalize(x, dtype=torch.float32)
    assert in_bf16.dtype == in_fp32.dtype == dtype
    assert torch.equal(in_bf16, in_bf16.bfloat16().to(dtype))
    assert torch.equal(in_fp32, in_fp32.bfloat16().to(dtype)) == (dtype == torch.bfloat16)


def test_the_norm_of_bf16_is_taken_in_fp32() -> None:
    x = matrices((4, 6)).bfloat16()
    in_fp32 = orthogonalize(x.float(), dtype=torch.float32)
    assert torch.equal(orthogonalize(x, dtype=torch.float32), in_fp32.bfloat16())


@pytest.mark.parametrize("shape", [(5, 6, 9), (5, 9, 6)])
def test_a_batch_is_its_matrices_one_by_one(shape: tuple[int, ...]) -> None:
    """The library may sum in another order for another batch: the bound of the float64 test."""
    x = matrices(shape) * torch.tensor([1.0, 100.0, 1e-5, 3.0, 1e4]).view(5, 1, 1)
    alone = torch.stack([orthogonalize(one, dtype=torch.float64) for one in x])
    torch.testing.assert_close(orthogonalize(x, dtype=torch.float64), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_zero_matrix_gives_zeros_and_does_not_affect_the_batch(dtype: torch.dtype) -> None:
    x = matrices((3, 4, 6)).float()
    whole = orthogonalize(x, dtype=dtype)
    x[1] = 0
    y = orthogonalize(x, dtype=dtype)
    assert torch.equal(y[1], torch.zeros(4, 6))
    assert torch.equal(y[[0, 2]], whole[[0, 2]])


def test_scale_does_not_matter_down_to_the_smallest_norm() -> None:
    """Powers of two scale without rounding, so the bits are equal; 2⁻⁴⁰ is 1e-12. Far below, the result goes to 0."""
    x = matrices((6, 9)).float()
    assert torch.equal(orthogonalize(x * 2.0**-40), orthogonalize(x))
    assert torch.equal(orthogonalize(x * 2.0**40), orthogonalize(x))
    assert orthogonalize(x * 1e-25).abs().max() < 1e-6


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_past_its_end_a_set_repeats_its_last_triple(coefficients: str) -> None:
    x = matrices((5, 7))
    u, sigma, vh = torch.linalg.svd(x, full_matrices=False)
    mapped = torch.from_numpy(polynomial((sigma / sigma.norm()).numpy(), coefficients, steps=11))
    y = orthogonalize(x, coefficients, steps=11, dtype=torch.float64)
    torch.testing.assert_close(y, u * mapped @ vh, rtol=0, atol=1e-12)
    assert coefficient_steps(coefficients, 11)[-1] == COEFFICIENTS[coefficients][-1]


def test_wrong_values_are_refused() -> None:
    with pytest.raises(UserError, match=r"'dino' is not a known set; use one of dion, keller, polar_express"):
        orthogonalize(torch.ones(2, 2), "dino")
    with pytest.raises(UserError, match=r"steps=0 .* use 1 or more"):
        orthogonalize(torch.ones(2, 2), steps=0)


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6), (1, 7)])
def test_flops_are_those_of_the_products(shape: tuple[int, int]) -> None:
    """Equal to torch's FlopCounterMode, which counts matrix products only."""
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(3, *shape), steps=4)
    assert counter.get_total_flops() == 3 * newton_schulz_flops(*shape, steps=4)
