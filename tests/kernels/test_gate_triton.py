"""The sigmoid gate and SwiGLU in Triton against the float64 references, which test_gate.py compares with the equations.

Shapes: T rows, N width.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_case import BOUNDS, DEVICE, assert_close
from trinity_kernels import gate_triton, sigmoid_gate, split, split_projection, swiglu, swiglu_triton
from trinity_kernels.op import Op

OPS = {"sigmoid_gate": sigmoid_gate, "swiglu": swiglu}
# T, N: tiles are 2048 numbers, 1024 columns at most
SIZES = [(0, 40), (1, 256), (7, 100), (63, 64), (64, 33), (65, 40), (129, 24), (3, 2050)]


def make(name: str, T: int, N: int, dtype: torch.dtype) -> list[Tensor]:
    """For the gate x and a part of a wider projection, for SwiGLU both halves in one."""
    random = torch.Generator().manual_seed(10 * T + N)
    wider = (3 * torch.randn(T, 2 * N + 8, generator=random)).to(DEVICE, dtype)
    if name == "swiglu":
        return [wider[:, 8:].contiguous().requires_grad_()]
    x = torch.randn(T, N, generator=random).to(DEVICE, dtype)
    return [x.requires_grad_(), wider[:, 8 : N + 8].requires_grad_()]


def run(function: Callable, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """Output and every gradient."""
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dy.to(out.dtype))]


def gradient(T: int, N: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(T, N, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


def compare(op: Op, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    got = run(op.triton, inputs, dy)
    exact = run(op.reference, [x.detach().double().requires_grad_() for x in inputs], dy)
    for actual, expected in zip(got, exact):
        assert actual.dtype == inputs[0].dtype
        assert_close(actual, expected, BOUNDS[actual.dtype])
    return got


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", OPS)
def test_matches_float64(name: str, sizes: tuple[int, int]) -> None:
    """Output and every gradient."""
    compare(OPS[name], make(name, *sizes, torch.float32), gradient(*sizes, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_matches_float64_in_16_bits(name: str, dtype: torch.dtype) -> None:
    """At most 1.1 times the error of the reference, which rounds in the same places."""
    inputs, dy = make(name, 65, 100, dtype), gradient(65, 100, dtype)
    got, references = compare(OPS[name], inputs, dy), run(OPS[name].reference, inputs, dy)
    exact = run(OPS[name].reference, [x.detach().double().requires_grad_() for x in inputs], dy)
    for actual, reference, expected in zip(got, references, exact):
        assert (actual - expected).norm() <= 1.1 * (reference - expected).norm() + 1e-5 * expected.norm()


@pytest.mark.parametrize("name", OPS)
def test_any_strides(name: str) -> None:
    """A transposed input, leading dimensions, and gradients of stride zero, as from sum()."""
    inputs = [x.detach().t().contiguous().t().requires_grad_() for x in make(name, 65, 40, torch.float32)]
    ones = torch.ones((), device=DEVICE).expand(65, 40)
    flat = compare(OPS[name], inputs, ones)
    deep = [x.detach().unflatten(0, (5, 13)).requires_grad_() for x in inputs]
    for one, other in zip(flat, run(OPS[name].triton, deep, ones.unflatten(0, (5, 13)))):
        assert torch.equal(one.flatten(), other.flatten())


@pytest.mark.parametrize("name", OPS)
def test_repetition_gives_the_same_bits(name: str) -> None:
    inputs, dy = make(name, 129, 24, torch.bfloat16), gradient(129, 24, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(*(run(OPS[name].triton, inputs, dy) for _ in range(2))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_in_a_slice(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written where the gradient of the projection has it: the same bits, and nothing beside it."""
    monkeypatch.setattr(split, "DEVICES", ("cpu", "cuda"))
    (x, gate), dy = make("sigmoid_gate", 65, 40, dtype), gradient(65, 40, dtype)
    wider = torch.cat((gate, torch.ones_like(gate)), dim=-1).detach().unflatten(0, (5, 13)).requires_grad_()
    (part, _), into = split_projection(wider, (40, 40))
    out = sigmoid_gate.triton(x.unflatten(0, (5, 13)), part, into[0])
    got = torch.autograd.grad(out, (x, wider), dy.unflatten(0, (5, 13)))
    exact = torch.autograd.grad(sigmoid_gate.triton(x, gate), (x, gate), dy)
    assert torch.equal(got[0], exact[0])
    assert torch.equal(got[1].flatten(0, 1), torch.cat((exact[1], torch.zeros_like(gate)), dim=-1))


@pytest.mark.parametrize("name", OPS)
def test_unsupported_arguments(name: str) -> None:
    inputs = [x.detach().double() for x in make(name, 3, 8, torch.float32)]
    with pytest.raises(ValueError, match="float64"):
        OPS[name](*inputs, kernel="triton")


@pytest.mark.parametrize("T", [7, 0])
def test_opcheck(T: int) -> None:
    """Schema, fake tensors, autograd registration and tracing, by torch's own checker."""
    x, (pre,) = gradient(T, 16, torch.float32), make("swiglu", T, 16, torch.float32)
    torch.library.opcheck(swiglu_triton.forward_op.op, (pre,))
    torch.library.opcheck(swiglu_triton.backward_op.op, (x, pre.detach()))
    inputs = make("sigmoid_gate", T, 16, torch.float32)
    torch.library.opcheck(gate_triton.forward_op.op, tuple(inputs))
    torch.library.opcheck(gate_triton.backward_op.op, (x, *(tensor.detach() for tensor in inputs)))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs the memory of a GPU")
@pytest.mark.parametrize("name", OPS)
def test_rows_beyond_two_to_the_31(name: str) -> None:
    """The last rows, where an element's index does not fit in 32 bits."""
    T, N = 2**31 // 2048 + 3, 1024
    wider = torch.randn(T, 2 * N, device=DEVICE, dtype=torch.bfloat16)
    inputs = [wider] if name == "swiglu" else [wider[:, :N], wider[:, N:]]
    last = OPS[name].reference(*(x[-3:] for x in inputs))
    assert_close(OPS[name].triton(*inputs)[-3:], last, BOUNDS[torch.bfloat16])
