"""qk_norm against its equation in float64, RoPE written with complex numbers.

Shapes: B batch, S sequence, H heads, C head width.
"""

import pytest
import torch
from torch import Tensor

from trinity_kernels import qk_norm

EPS = 1e-5
# fp32: a few roundings of 2⁻²⁴; bf16: rounded once, 2⁻⁹, since nothing is rounded between norm and rotation
BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}


def make(B: int, S: int, H: int, C: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries as a part of a wider projection, and a gain in the master dtype."""
    random = torch.Generator().manual_seed(0)
    projection = torch.randn(B, S, (H + 3) * C, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    gain_C = 1 + 0.3 * torch.randn(C, generator=random, dtype=torch.float64)
    x_BSHC = projection[..., C : (H + 1) * C].unflatten(-1, (H, C))
    return x_BSHC, gain_C.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()


def angles_of(rows: int, S: int, C: int) -> Tensor:
    """[rows, S, 1, C/2] float64."""
    return 6 * torch.rand(rows, S, 1, C // 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def plain(x: Tensor, gain_C: Tensor, angles: Tensor | None) -> Tensor:
    """Normalised, then (n_i, n_{i+C/2}) times e^{iφ}."""
    x = x.double()
    n = x / ((x * x).mean(dim=-1, keepdim=True) + EPS).sqrt() * gain_C.double()
    if angles is None:
        return n
    turned = torch.complex(*n.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("rows", [None, 1, 2])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_matches_the_equation(tokens: int, rows: int | None, dtype: torch.dtype) -> None:
    """Output and both gradients, without rotation, with one for all rows and with one for each."""
    x, gain_C = make(2, tokens, 3, 8, dtype)
    angles = None if rows is None else angles_of(rows, tokens, 8)
    rotation = None if rows is None else (angles.cos().to(gain_C.dtype), angles.sin().to(gain_C.dtype))
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    got, exact = qk_norm(x, gain_C, EPS, rotation), plain(x, gain_C, angles)
    grads, exact_grads = (torch.autograd.grad(y, (x, gain_C), dy.to(y.dtype)) for y in (got, exact))
    assert [y.dtype for y in (got, *grads)] == [dtype, dtype, gain_C.dtype]
    for actual, true in zip((got, *grads), (exact, *exact_grads)):
        distance = (actual.double() - true.double()).norm() / true.double().norm().clamp_min(1e-300)
        assert distance <= BOUNDS[dtype]


def test_gradcheck() -> None:
    x, gain_C = make(1, 2, 2, 4, torch.float64)
    angles = angles_of(1, 2, 4)
    inputs = x.detach().clone().requires_grad_(), gain_C
    torch.autograd.gradcheck(lambda x, g: qk_norm(x, g, EPS, (angles.cos(), angles.sin())), inputs)


def test_bf16_is_not_rounded_between_norm_and_rotation() -> None:
    """A turn by 0 changes no bit; any turn is nearer to float64 than with the norm rounded first."""
    x, gain_C = make(2, 64, 3, 16, torch.bfloat16)
    nothing = torch.zeros(1, 64, 1, 8)
    assert torch.equal(qk_norm(x, gain_C, EPS, (nothing.cos(), nothing.sin())), qk_norm(x, gain_C, EPS))
    angles = angles_of(1, 64, 16)
    exact, rotation = plain(x, gain_C, angles), (angles.cos().float(), angles.sin().float())
    once = qk_norm(x, gain_C, EPS, rotation)
    first, second = qk_norm(x, gain_C, EPS).float().chunk(2, dim=-1)
    cos, sin = rotation
    twice = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).bfloat16()
    assert (once - exact).norm() < 0.8 * (twice - exact).norm()
