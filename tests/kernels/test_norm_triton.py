"""RMSNorm in Triton, alone and with the residual stream, against the float64 reference, which test_norm.py compares
with its equation.

Shapes: T rows, D width.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_case import BOUNDS, DEVICE, assert_close
from trinity_kernels import add_norm, norm_add, norm_triton, rms_norm
from trinity_kernels.op import Op

EPS = 1e-3
OPS = {"rms_norm": rms_norm, "norm_add": norm_add, "add_norm": add_norm}
# T, D: rows that fill and overflow tiles of several rows, and rows wider than a tile of 1024
SIZES = [(0, 40), (1, 256), (7, 100), (63, 64), (64, 33), (65, 40), (129, 24), (65, 1030)]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, so that each loops several times, some once less than others."""
    monkeypatch.setattr(norm_triton, "MULTIPROCESSORS", 1)


def make(name: str, T: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    """The op's tensors: small rows, so that ε shows, and gains of fp32."""
    random = torch.Generator().manual_seed(10 * T + D)
    rows = [0.1 * torch.randn(T, D, generator=random) for _ in range(1 if name == "rms_norm" else 2)]
    gains = [1 + 0.3 * torch.randn(D, generator=random) for _ in range(2 if name == "add_norm" else 1)]
    return [x.to(DEVICE).requires_grad_() for x in (*(row.to(dtype) for row in rows), *gains)]


def outputs_of(function: Callable, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    out = function(*inputs, EPS)
    return out if isinstance(out, tuple) else (out,)


def run(function: Callable, inputs: list[Tensor], dys: list[Tensor]) -> list[Tensor]:
    """Outputs and every input's gradient."""
    out = outputs_of(function, inputs)
    return [*(y.detach() for y in out), *torch.autograd.grad(out, inputs, [dy.to(y.dtype) for y, dy in zip(out, dys)])]


def gradients(T: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(T, D, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype) for seed in range(2)]


def compare(op: Op, inputs: list[Tensor], dys: list[Tensor]) -> list[Tensor]:
    dtype = inputs[0].dtype
    got = run(op.triton, inputs, dys)
    exact = run(op.reference, [x.detach().double().requires_grad_() for x in inputs], dys)
    outputs = len(got) - len(inputs)
    assert [x.dtype for x in got] == [dtype] * outputs + [x.dtype for x in inputs]
    for actual, expected in zip(got, exact):
        assert_close(actual, expected, BOUNDS[dtype])
    return got


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", OPS)
def test_matches_float64(name: str, sizes: tuple[int, int]) -> None:
    """Outputs and every gradient."""
    compare(OPS[name], make(name, *sizes, torch.float32), gradients(*sizes, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_matches_float64_in_16_bits(name: str, dtype: torch.dtype) -> None:
    """Also at most 1.1 times the error of the reference, which rounds in the same places.

    Not 1.0, because a sum in another order now and then rounds to the other neighbour in 16 bits.
    """
    inputs, dys = make(name, 65, 100, dtype), gradients(65, 100, dtype)
    got, references = compare(OPS[name], inputs, dys), run(OPS[name].reference, inputs, dys)
    exact = run(OPS[name].reference, [x.detach().double().requires_grad_() for x in inputs], dys)
    for actual, reference, expected in zip(got, references, exact):
        assert (actual - expected).norm() <= 1.1 * (reference - expected).norm() + 1e-5 * expected.norm()


def test_second_norm_is_of_the_rounded_sum() -> None:
    """In bf16, fewer than 1 in 200 elements of r and u differ from the reference, by sums in another order.

    Computed from the sum before rounding, a third of u would differ.
    """
    inputs = make("add_norm", 65, 256, torch.bfloat16)
    r, u = add_norm.triton(*inputs, EPS)
    assert (r != add_norm.reference(*inputs, EPS)[0]).float().mean() < 1 / 200
    assert (u != rms_norm.reference(r, inputs[3], EPS)).float().mean() < 1 / 200
    y, x, post_gain, gain = (tensor.double() for tensor in inputs)
    of_the_sum = rms_norm.reference(norm_add.reference(y, x, post_gain, EPS), gain, EPS).bfloat16()
    assert (u != of_the_sum).float().mean() > 1 / 5


@pytest.mark.parametrize("name", OPS)
def test_any_strides(name: str) -> None:
    """A transposed input, and gradients of stride zero, as from sum()."""
    inputs = make(name, 65, 40, torch.float32)
    inputs[0] = inputs[0].detach().t().contiguous().t().requires_grad_()
    ones = torch.ones((), device=DEVICE).expand(65, 40)
    compare(OPS[name], inputs, [ones, ones])


@pytest.mark.parametrize("name", OPS)
def test_leading_dimensions_and_gains_of_16_bits(name: str) -> None:
    """[..., D] equals [T, D]; a gain of any dtype is cast to fp32, and its gradient has its dtype."""
    inputs, dys = make(name, 24, 40, torch.float32), gradients(24, 40, torch.float32)
    flat = run(OPS[name].triton, inputs, dys)
    deep = [x.detach().view(2, 3, 4, 40) if x.dim() == 2 else x.detach() for x in inputs]
    for one, other in zip(
        flat, run(OPS[name].triton, [x.requires_grad_() for x in deep], [d.view(2, 3, 4, 40) for d in dys])
    ):
        assert torch.equal(one.flatten(), other.flatten())
    inputs = [x.detach().bfloat16().requires_grad_() if x.dim() == 1 else x for x in inputs]
    assert run(OPS[name].triton, inputs, dys)[-1].dtype == torch.bfloat16


@pytest.mark.parametrize("name", OPS)
def test_repetition_gives_the_same_bits(name: str) -> None:
    inputs, dys = make(name, 129, 24, torch.bfloat16), gradients(129, 24, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(*(run(OPS[name].triton, inputs, dys) for _ in range(2))))


@pytest.mark.parametrize("used", [0, 1])
def test_an_unused_result_has_no_gradient(used: int) -> None:
    inputs = make("add_norm", 7, 40, torch.float32)
    got, expected = (
        torch.autograd.grad(function(*inputs, EPS)[used].square().sum(), inputs, materialize_grads=True)
        for function in (add_norm.triton, add_norm.reference)
    )
    for actual, reference in zip(got, expected):
        assert_close(actual, reference, BOUNDS[torch.float32])


def test_unsupported_arguments() -> None:
    x, gain_D = torch.randn(3, 8, dtype=torch.float64), torch.ones(8)
    assert rms_norm(x, gain_D, EPS).dtype == torch.float64  # auto takes the reference
    with pytest.raises(ValueError, match="float64"):
        rms_norm(x, gain_D, EPS, kernel="triton")
    with pytest.raises(ValueError, match="wider than 4096"):
        rms_norm(torch.zeros(1, 4097), torch.ones(4097), EPS, kernel="triton")


@pytest.mark.parametrize("T", [7, 0])
def test_opcheck(T: int) -> None:
    """Schema, fake tensors, autograd registration and tracing, by torch's own checker."""
    trinity, (y, x, p, g) = torch.ops.trinity, make("add_norm", T, 16, torch.float32)
    for added in (None, x):
        torch.library.opcheck(trinity.norm_triton.default, (y, added, p, EPS))
    torch.library.opcheck(trinity.add_norm_triton.default, (y, x, p, g, EPS))
    y, x, p, g = (tensor.detach() for tensor in (y, x, p, g))
    r, _, inverse_y, inverse_r = norm_triton.add_norm_forward(y, x, p, g, EPS)
    torch.library.opcheck(trinity.norm_triton_backward.default, (x, y, p, inverse_y))
    arguments = (x, y, y, r, p, g, inverse_y, inverse_r)
    torch.library.opcheck(trinity.add_norm_triton_backward.default, arguments)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs the memory of a GPU")
def test_rows_beyond_two_to_the_31() -> None:
    """The last rows, where an element's index does not fit in 32 bits."""
    T, D = 2**31 // 1024 + 3, 1024
    y, x = (torch.randn(T, D, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    gain_D = torch.rand(D, device=DEVICE)
    for actual, exact in zip(
        add_norm.triton(y, x, gain_D, gain_D, EPS), add_norm.reference(y[-3:], x[-3:], gain_D, gain_D, EPS)
    ):
        assert_close(actual[-3:], exact, BOUNDS[torch.bfloat16])
