"""rms_norm, norm_add and add_norm against their equations in float64; in bf16 against transformers' AfMoE's norm.

Shapes: D normalised width.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.afmoe.modeling_afmoe import AfmoeRMSNorm

from trinity_kernels import add_norm, norm_add, rms_norm

EPS = 1e-5
# fp32: a few roundings of 2⁻²⁴ and sums of 48 squares; bf16: the result is rounded once, 2⁻⁹
BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}


def make(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x, small enough that ε shows, and a gain in the master dtype."""
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
    errors = [error(a, b.double()) for a, b in zip((got, *grads), (exact, *exact_grads))]
    assert max(errors) <= BOUNDS[dtype], errors


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
    """As in AfMoE: gain in fp32, then one rounding.

    The mean square is summed in another order, so fewer than 1 in 200 results, near the middle of two bf16 numbers,
    round the other way. Rounding before the gain, as in Llama, changes a quarter of them.
    """
    x, gain_D = make((64, 256), torch.bfloat16)
    peer = AfmoeRMSNorm(256, EPS)
    peer.weight.data.copy_(gain_D)
    llama = ((x.float() * (x.float().square().mean(-1, keepdim=True) + EPS).rsqrt()).bfloat16() * gain_D).bfloat16()
    actual = rms_norm(x, gain_D, EPS)
    assert (actual != peer(x)).float().mean() < 1 / 200
    assert (actual != llama).float().mean() > 1 / 5
    assert torch.allclose(actual.float(), peer(x).float(), rtol=2**-7, atol=0)  # none is off by more than one step


def test_repetition_gives_the_same_bits() -> None:
    x, gain_D = make((64, 48), torch.bfloat16)
    runs = []
    for _ in range(2):
        y = rms_norm(x, gain_D, EPS)
        runs.append([y, *torch.autograd.grad(y.sum(), (x, gain_D))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def make_stream(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """y, a sublayer's output; x, the residual stream before it; and two gains."""
    y, post_gain_D = make(shape, dtype)
    random = torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    gain_D = torch.rand(shape[-1], generator=random, dtype=torch.float64).to(post_gain_D.dtype).requires_grad_()
    return [y, x, post_gain_D, gain_D]


def plain_stream(
    y: Tensor, x: Tensor, post_gain_D: Tensor, gain_D: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """x + RMSNorm(y) in float64, and the norm of it rounded to x's dtype; gradients ignore the rounding."""
    r = x.double() + plain(y, post_gain_D)
    if gain_D is None:
        return r, None
    rounded = r + (r.to(x.dtype).double() - r).detach()
    return r, plain(rounded, gain_D)


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 4, 48), (0, 48), (7, 3)])
def test_sums_match_the_equation(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Both ops, every output and every gradient; r and u both get gradients, that of u through r."""
    inputs = make_stream(shape, dtype)
    dys = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (3, 4)]
    got, exact = add_norm(*inputs, EPS), plain_stream(*inputs)
    grads, exact_grads = (torch.autograd.grad(rs, inputs, [dy.to(rs[0].dtype) for dy in dys]) for rs in (got, exact))
    alone, exact_alone = norm_add(*inputs[:3], EPS), plain_stream(*inputs[:3])[0]
    grads += torch.autograd.grad(alone, inputs[:3], dys[0])
    exact_grads += torch.autograd.grad(exact_alone, inputs[:3], dys[0].double())
    wide = inputs[2].dtype
    assert [x.dtype for x in (*got, alone)] == [dtype] * 3
    assert [g.dtype for g in grads] == [dtype, dtype, wide, wide, dtype, dtype, wide]
    pairs = zip((*got, alone, *grads), (*exact, exact_alone, *exact_grads))
    errors = [error(a, b.double()) for a, b in pairs]
    assert max(errors) <= BOUNDS[dtype], errors


@pytest.mark.parametrize("op", [norm_add, add_norm])
def test_gradcheck_of_sums(op: Callable) -> None:
    """As for rms_norm; y of size 1."""
    y, *others = make_stream((3, 6), torch.float64)
    inputs = [(100 * y).detach().requires_grad_(), *others][: 4 if op is add_norm else 3]
    torch.autograd.gradcheck(lambda *tensors: op(*tensors, EPS), inputs)


def test_add_norm_is_the_composition() -> None:
    """In fp32 equal up to a few roundings; u is bit for bit the norm of r, in bf16 as well."""
    inputs = make_stream((5, 48), torch.float32)
    r = inputs[1] + rms_norm(inputs[0], inputs[2], EPS)
    composed, fused = (r, rms_norm(r, inputs[3], EPS)), add_norm(*inputs, EPS)
    dys = [torch.randn(5, 48, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)]
    for actual, peer in zip(
        (*fused, *torch.autograd.grad(fused, inputs, dys)), (*composed, *torch.autograd.grad(composed, inputs, dys))
    ):
        assert error(actual, peer.double()) <= BOUNDS[torch.float32]
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_stream((64, 48), dtype)
        r, u = add_norm(*inputs, EPS)
        assert torch.equal(u, rms_norm(r, inputs[3], EPS))
        assert torch.equal(r, norm_add(*inputs[:3], EPS))


@pytest.mark.parametrize("used", [0, 1])
def test_an_unused_result_has_no_gradient(used: int) -> None:
    """r alone is norm_add; u alone is as in the composition."""
    inputs = make_stream((5, 48), torch.float32)
    r = inputs[1] + rms_norm(inputs[0], inputs[2], EPS)
    expected = (r, rms_norm(r, inputs[3], EPS))[used].sum()
    got = add_norm(*inputs, EPS)[used].sum()
    for actual, peer in zip(*(torch.autograd.grad(y, inputs, materialize_grads=True) for y in (got, expected))):
        assert error(actual, peer.double()) <= BOUNDS[torch.float32]
