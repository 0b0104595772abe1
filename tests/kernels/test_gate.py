"""sigmoid_gate and swiglu against their equations in float64, gradients by autograd of those."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trinity_kernels import sigmoid_gate, swiglu

# fp32: a few roundings of 2⁻²⁴; bf16: every result is rounded once, 2⁻⁹
BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}


def gated(x: Tensor, gate: Tensor) -> Tensor:
    return x / (1 + (-gate).exp())


def plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


def inputs_of(op: Callable, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """For the gate: x, and a gate that is a part of a wider tensor; for SwiGLU both halves."""
    random = torch.Generator().manual_seed(0)
    rows, width = shape[:-1], shape[-1]
    if op is swiglu:
        return [(3 * torch.randn(*rows, 2 * width, generator=random)).to(dtype).requires_grad_()]
    wider = (3 * torch.randn(*rows, 2 * width + 5, generator=random)).to(dtype).requires_grad_()
    x = torch.randn(shape, generator=random).to(dtype).requires_grad_()
    return [x, wider[..., 3 : width + 3]]


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24)])
@pytest.mark.parametrize(("op", "plain"), [(sigmoid_gate, gated), (swiglu, plain_swiglu)])
def test_matches_the_equation(op: Callable, plain: Callable, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = inputs_of(op, shape, dtype)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got, exact = op(*inputs), plain(*(x.double() for x in inputs))
    grads, exact_grads = (torch.autograd.grad(y, inputs, dy.to(y.dtype)) for y in (got, exact))
    assert got.is_contiguous()
    for actual, true in zip((got, *grads), (exact, *exact_grads)):
        assert actual.dtype == dtype
        assert actual.shape == true.shape
        distance = (actual.double() - true.double()).norm() / true.double().norm().clamp_min(1e-300)
        assert distance <= BOUNDS[dtype]


@pytest.mark.parametrize("op", [sigmoid_gate, swiglu])
def test_gradcheck(op: Callable) -> None:
    """Finite differences in float64."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs_of(op, (3, 6), torch.float64)]
    torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("op", [sigmoid_gate, swiglu])
def test_far_from_zero(op: Callable) -> None:
    """Gates of ±1000 are fully open or closed, σ' is 0, and nothing is NaN."""
    ends = torch.tensor([[-1000.0, 1000.0]], requires_grad=True)
    twos = torch.full((1, 2), 2.0, requires_grad=True)
    y = sigmoid_gate(twos, ends) if op is sigmoid_gate else swiglu(torch.cat((ends, twos), dim=-1))
    grads = torch.autograd.grad(y.sum(), (ends, twos))
    expected = ([0, 2], [0, 0], [0, 1]) if op is sigmoid_gate else ([0, 2000], [0, 2], [0, 1000])
    assert [x.flatten().tolist() for x in (y, *grads)] == [list(map(float, values)) for values in expected]
