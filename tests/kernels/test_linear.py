"""linear against float64, with bf16 arithmetic on the CPU and without (simulated).

Shapes: ... any leading dimensions, I input width, O output width.
"""

import importlib

import pytest
import torch
from torch import Tensor

from trinity_kernels import linear

MODULE = importlib.import_module("trinity_kernels.linear")  # the package's attribute of that name is the function
I, O = 48, 24


@pytest.fixture(params=[True, False], ids=["bf16 arithmetic", "widened"])
def has_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Let linear run as on a CPU with bf16 arithmetic, or as on one without; the product works either way."""
    monkeypatch.setattr(MODULE, "_cpu_has_bf16", lambda: request.param)
    return request.param


def make(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, the weight and an incoming gradient."""
    random = torch.Generator().manual_seed(0)
    sizes = [(*shape, I), (O, I), (*shape, O)]
    x, weight_OI, dy = (torch.randn(size, generator=random, dtype=torch.float64).to(dtype) for size in sizes)
    return x.requires_grad_(), weight_OI.requires_grad_(), dy


def exact_results(x: Tensor, weight_OI: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx and dW in float64."""
    x, weight_OI, dy = x.double(), weight_OI.double(), dy.double()
    return [x @ weight_OI.t(), dy @ weight_OI, torch.einsum("no,ni->oi", dy.reshape(-1, O), x.reshape(-1, I))]


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (0,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_matches_float64(shape: tuple[int, ...], dtype: torch.dtype, has_bf16: bool) -> None:
    """bf16: the float64 result rounded once, 2⁻⁹ of each number, plus the error of fp32 sums of 48 products."""
    x, weight_OI, dy = make(shape, dtype)
    assert MODULE.multiplies_in_fp32(x) == (dtype == torch.bfloat16 and not has_bf16)
    y = linear(x, weight_OI)
    got = [y, *torch.autograd.grad(y, (x, weight_OI), dy)]
    relative, absolute = {
        torch.float64: (0, 1e-13),
        torch.float32: (0, 1e-4),
        torch.bfloat16: (2**-8, 1e-4),
    }[dtype]
    for actual, exact in zip(got, exact_results(x, weight_OI, dy)):
        assert actual.dtype == dtype
        assert torch.allclose(actual.double(), exact, rtol=relative, atol=absolute)


@pytest.mark.parametrize("trains", [(True, False), (False, True)])
@pytest.mark.usefixtures("has_bf16")
def test_frozen_inputs(trains: tuple[bool, bool]) -> None:
    """An input that needs no gradient gets none; the other gradient is the same."""
    x, weight_OI, dy = make((7,), torch.bfloat16)
    both = torch.autograd.grad(linear(x, weight_OI), (x, weight_OI), dy)
    inputs = [tensor.detach().requires_grad_(needs) for tensor, needs in zip((x, weight_OI), trains)]
    linear(*inputs).backward(dy)
    for tensor, needs, gradient in zip(inputs, trains, both):
        assert torch.equal(tensor.grad, gradient) if needs else tensor.grad is None


def test_the_operands_are_saved_in_their_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as fp32 copies, which would double the memory of activations."""
    monkeypatch.setattr(MODULE, "_cpu_has_bf16", lambda: False)
    x, weight_OI, _ = make((7,), torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        linear(x, weight_OI)
    assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr(), weight_OI.data_ptr()]
