"""rms_norm against its equation in float64, and in bf16 against the norm of transformers' AfMoE."""

import pytest
import torch
from torch import Tensor
from transformers.models.afmoe.modeling_afmoe import AfmoeRMSNorm

from trinity_kernels import rms_norm

EPS = 1e-5
# fp32: a few roundings of 2⁻²⁴ and sums of 48 squares; bf16: the result is rounded once, 2⁻⁹
BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}


def make(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x, small enough that ε shows, and a gain in the precision gains are kept in."""
    random = torch.Generator().manual_seed(0)
    x = (0.01 * torch.randn(shape, generator=random, dtype=torch.float64)).to(dtype)
    gain_D = 1 + 0.3 * torch.randn(shape[-1], generator=random, dtype=torch.float64)
    return x.requires_grad_(), gain_D.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()


def plain(x: Tensor, gain_D: Tensor) -> Tensor:
    """x / √(mean(x²) + ε) · g in float64."""
    x, gain_D = x.double(), gain_D.double()
    return x / ((x * x).mean(dim=-1, keepdim=True) + EPS).sqrt() * gain_D


def error(got: Tensor, exact: Tensor) -> float:
    """Relative L2 distance."""
    assert got.shape == exact.shape
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 4, 48), (0, 48), (5, 1)])
def test_matches_the_equation(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Output and both gradients; every dimension before the last is a batch."""
    x, gain_D = make(shape, dtype)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got, exact = rms_norm(x, gain_D, EPS), plain(x, gain_D)
    assert got.dtype == dtype
    grads, exact_grads = (torch.autograd.grad(y, (x, gain_D), dy.to(y.dtype)) for y in (got, exact))
    assert [g.dtype for g in grads] == [dtype, gain_D.dtype]
    found = [error(a, b.double()) for a, b in zip((got, *grads), (exact, *exact_grads))]
    assert max(found) <= BOUNDS[dtype], found


def test_gradcheck() -> None:
    """Finite differences in float64, torch's own tolerances; x of size 1, since 1e-6 steps are large beside 0.01."""
    x, gain_D = make((3, 6), torch.float64)
    torch.autograd.gradcheck(lambda x, g: rms_norm(x, g, EPS), ((100 * x).detach().requires_grad_(), gain_D))


def test_a_row_of_zeros_is_zero() -> None:
    """ε keeps 0/0 away; the gradient there is g·dy/√ε, exactly what the equation gives."""
    x = torch.zeros(2, 8, dtype=torch.float64, requires_grad=True)
    gain_D = torch.full((8,), 2.0, dtype=torch.float64)
    y = rms_norm(x, gain_D, EPS)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert x.grad.flatten().tolist() == pytest.approx([2 / EPS**0.5] * 16, rel=1e-14)


def test_bf16_rounds_once_after_the_gain() -> None:
    """As AfMoE does: gain in fp32, then one rounding.

    The mean square is summed in another order, so now and then a result near the middle of two bf16 numbers goes the
    other way: fewer than 1 in 200. Rounding before the gain, as Llama does, changes a quarter of them.
    """
    x, gain_D = make((64, 256), torch.bfloat16)
    theirs = AfmoeRMSNorm(256, EPS)
    theirs.weight.data.copy_(gain_D)
    llama = ((x.float() * (x.float().square().mean(-1, keepdim=True) + EPS).rsqrt()).bfloat16() * gain_D).bfloat16()
    ours = rms_norm(x, gain_D, EPS)
    assert (ours != theirs(x)).float().mean() < 1 / 200
    assert (ours != llama).float().mean() > 1 / 5
    assert torch.allclose(ours.float(), theirs(x).float(), rtol=2**-7, atol=0)  # none is off by more than one step


def test_repetition_gives_the_same_bits() -> None:
    x, gain_D = make((64, 48), torch.bfloat16)
    runs = []
    for _ in range(2):
        y = rms_norm(x, gain_D, EPS)
        runs.append([y, *torch.autograd.grad(y.sum(), (x, gain_D))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))
