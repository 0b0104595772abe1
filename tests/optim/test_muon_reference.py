"""The plain reference Muon against its equations, one matrix at a time in float64, with the SVD for Newton-Schulz."""

import math

import pytest
import torch
from torch import Tensor

from trinity.models.param_roles import Role
from trinity.optim.muon_reference import ReferenceMuon, newton_schulz
from trinity.optim.newton_schulz import COEFFICIENTS, coefficient_steps

# Weights are of order 1; Newton-Schulz amplifies rounding of 2⁻⁵³ by at most its slopes, below 1e3.
FLOAT64 = {"rtol": 0, "atol": 1e-12}


def by_svd(x: Tensor, coefficients: str = "dion") -> Tensor:
    """U p(σ/‖x‖) Vᵀ: the polynomial p applied to the singular values."""
    u, sigma, vh = torch.linalg.svd(x, full_matrices=False)
    sigma = sigma / sigma.norm(dim=-1, keepdim=True).clamp_min(1e-14)
    for a, b, c in coefficient_steps(coefficients, 5):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return u * sigma.unsqueeze(-2) @ vh


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def role_of(weight: Tensor, kind: str, rows: tuple[int, ...]) -> Role:
    return Role(kind, torch.nn.Parameter(weight.clone()), kind, rows)


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(6, 6), (10, 6), (6, 10), (1, 7), (7, 1), (3, 2, 4, 6)])
def test_newton_schulz_maps_singular_values(shape: tuple[int, ...], coefficients: str) -> None:
    x = 3.7 * random(*shape)
    y = newton_schulz(x, coefficient_steps(coefficients, 5), torch.float64)
    torch.testing.assert_close(y, by_svd(x, coefficients), **FLOAT64)
    assert newton_schulz(torch.zeros(shape), coefficient_steps(coefficients, 5), torch.bfloat16).eq(0).all()


@pytest.mark.parametrize("nesterov", [True, False])
def test_packed_rows_are_separate_matrices(nesterov: bool) -> None:
    """Two steps of q, k, v and gate in one tensor, written out matrix by matrix; the rate factors are √(10/6) and 1."""
    rows, mu, decay, lr = (10, 2, 2, 10), 0.9, 0.3, 0.1
    weight, first, second = (random(24, 6, seed=seed) for seed in range(3))
    role = role_of(weight, "matrix", rows)
    optimizer = ReferenceMuon([role], lr, mu, nesterov, decay, dtype=torch.float64)
    for gradient in (first, second):
        role.parameter.grad = gradient
        optimizer.step()
    for start, m in zip((0, 10, 12, 14), rows):
        matrix = slice(start, start + m)
        w, g1, g2 = weight[matrix], first[matrix], second[matrix]
        u1, u2 = (g1 + mu * g1, g2 + mu * (mu * g1 + g2)) if nesterov else (g1, mu * g1 + g2)
        for u in (u1, u2):
            w = w * (1 - lr * decay) - lr * math.sqrt(max(1, m / 6)) * by_svd(u)
        torch.testing.assert_close(role.parameter.detach()[matrix], w, **FLOAT64)
    torch.testing.assert_close(optimizer.state[role.parameter]["momentum"], mu * first + second, **FLOAT64)


@pytest.mark.parametrize("starved", ["decay", "full"])
def test_experts_are_a_batch_and_starve_one_by_one(starved: str) -> None:
    """Expert 1 of [3, 6, 4] has a gradient in steps 0 and 3 only: its updates get the factors 1, μ, μ², 1."""
    mu, lr = 0.5, 0.1
    role = role_of(random(3, 6, 4), "experts", (6,))
    optimizer = ReferenceMuon([role], lr, mu, False, 0.0, dtype=torch.float64, starved=starved)
    expected, momentum = role.parameter.detach().clone(), torch.zeros(3, 6, 4, dtype=torch.float64)
    for step, k in enumerate([0, 1, 2, 0]):
        gradient = random(3, 6, 4, seed=step)
        if k:
            gradient[1] = 0
        role.parameter.grad = gradient
        optimizer.step()
        momentum = mu * momentum + gradient
        for expert in range(3):
            factor = mu**k if starved == "decay" and expert == 1 else 1.0
            expected[expert] -= lr * factor * math.sqrt(6 / 4) * by_svd(momentum[expert])
        assert optimizer.state[role.parameter]["starved_steps"].flatten().tolist() == [0, k, 0]
    torch.testing.assert_close(role.parameter.detach(), expected, **FLOAT64)


def test_a_missing_gradient_is_zero() -> None:
    """Momentum shrinks by μ, and the update still follows it: in full for a plain matrix, times μ for an expert."""
    weight = random(6, 4)
    roles = [role_of(weight, "matrix", (6,)), role_of(weight, "experts", (6,))]
    optimizer = ReferenceMuon(roles, 0.1, 0.9, weight_decay=0.0, dtype=torch.float64)
    for role in roles:
        role.parameter.grad = random(6, 4, seed=1)
    optimizer.step()
    before = [role.parameter.detach().clone() for role in roles]
    optimizer.zero_grad()
    optimizer.step()
    for role, old, factor in zip(roles, before, (1.0, 0.9)):
        step = 0.1 * factor * math.sqrt(6 / 4) * by_svd(random(6, 4, seed=1))
        torch.testing.assert_close(old - role.parameter.detach(), step, **FLOAT64)
