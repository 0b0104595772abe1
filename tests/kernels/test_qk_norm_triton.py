"""QK-norm with RoPE in Triton against the float64 reference, which test_qk_norm.py compares with its equation.

Shapes: B batch, S sequence, T = B·S tokens, H heads, C head width.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_case import BOUNDS, DEVICE, assert_close
from trinity_kernels import qk_norm, qk_norm_triton, split, split_projection

EPS = 1e-3
# B, S, H, C: T of 0, 1, 7, 63, 64, 65 and 129; a program takes 16 tokens, of the widest head 1
SIZES = [(2, 0, 2, 8), (1, 1, 3, 64), (1, 7, 2, 130), (3, 21, 1, 16), (4, 16, 2, 24), (5, 13, 2, 10), (3, 43, 4, 32)]


def make(B: int, S: int, H: int, C: int, dtype: torch.dtype, rows: int | None) -> tuple:
    """Queries as a part of a wider projection, a gain in fp32, and a rotation for `rows` rows."""
    random = torch.Generator().manual_seed(B + S)
    projection = (0.1 * torch.randn(B, S, (H + 3) * C, generator=random)).to(DEVICE, dtype)
    x_BSHC = projection[..., C : (H + 1) * C].unflatten(-1, (H, C)).requires_grad_()
    gain_C = (1 + 0.3 * torch.randn(C, generator=random)).to(DEVICE).requires_grad_()
    if rows is None:
        return x_BSHC, gain_C, None
    angles = (6 * torch.rand(rows, S, 1, C // 2, generator=random, dtype=torch.float64)).to(DEVICE)
    return x_BSHC, gain_C, (angles.cos(), angles.sin())


def run(function: Callable, x: Tensor, gain_C: Tensor, rotation: tuple | None, dy: Tensor) -> list[Tensor]:
    """Output and both gradients."""
    rotation = None if rotation is None else tuple(part.to(gain_C.dtype) for part in rotation)
    out = function(x, gain_C, EPS, rotation)
    return [out.detach(), *torch.autograd.grad(out, (x, gain_C), dy.to(out.dtype))]


def compare(x: Tensor, gain_C: Tensor, rotation: tuple | None, dy: Tensor) -> None:
    got = run(qk_norm.triton, x, gain_C, rotation, dy)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, gain_C)]
    exact = run(qk_norm.reference, *wide, rotation, dy)
    assert [tensor.dtype for tensor in got] == [x.dtype, x.dtype, torch.float32]
    assert got[0].is_contiguous()
    for actual, expected in zip(got, exact):
        assert_close(actual, expected, BOUNDS[x.dtype])


def gradient(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, x.dtype)


@pytest.mark.parametrize("batch_rows", [None, "one", "each"])
@pytest.mark.parametrize("sizes", SIZES)
def test_matches_float64(sizes: tuple[int, ...], batch_rows: str | None) -> None:
    """Without rotation, with one for all rows of the batch, and with one for each."""
    rows = {None: None, "one": 1, "each": sizes[0]}[batch_rows]
    inputs = make(*sizes, torch.float32, rows)
    compare(*inputs, gradient(inputs[0]))


@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matches_float64_in_16_bits(dtype: torch.dtype, rows: int | None) -> None:
    """At most 1.1 times the reference's error: neither rounds between norm and rotation.

    A second rounding there would give 1.4 times the error.
    """
    x, gain_C, rotation = make(5, 13, 2, 64, dtype, rows)
    compare(x, gain_C, rotation, gradient(x))
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, gain_C)]
    exact = run(qk_norm.reference, *wide, rotation, gradient(x))
    actuals, references = (run(op, x, gain_C, rotation, gradient(x)) for op in (qk_norm.triton, qk_norm.reference))
    for actual, reference, expected in zip(actuals, references, exact):
        assert (actual - expected).norm() <= 1.1 * (reference - expected).norm() + 1e-5 * expected.norm()


@pytest.mark.parametrize("dy", ["zero strides", "heads first", "features apart"])
def test_gradients_of_any_strides(dy: str) -> None:
    """As from sum(), as from attention over [B, H, S, C], and with features that are not contiguous."""
    x, gain_C, rotation = make(5, 13, 2, 16, torch.float32, 1)
    random = torch.Generator().manual_seed(0)
    gradients = {
        "zero strides": torch.ones(()).expand(5, 13, 2, 16),
        "heads first": torch.randn(5, 2, 13, 16, generator=random).transpose(1, 2),
        "features apart": torch.randn(16, 5, 13, 2, generator=random).permute(1, 2, 3, 0),
    }
    compare(x, gain_C, rotation, gradients[dy].to(DEVICE))


def test_the_widest_head() -> None:
    inputs = make(1, 3, 2, 2048, torch.float32, 1)
    compare(*inputs, gradient(inputs[0]))


def test_repetition_gives_the_same_bits() -> None:
    inputs = make(3, 43, 4, 32, torch.bfloat16, 3)
    first, second = (run(qk_norm.triton, *inputs, gradient(inputs[0])) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_in_a_slice(dtype: torch.dtype, rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written where the gradient of the projection has it: the same bits, and nothing beside it."""
    monkeypatch.setattr(split, "DEVICES", ("cpu", "cuda"))
    x, gain_C, rotation = make(3, 43, 4, 32, dtype, rows)
    rotation = None if rotation is None else tuple(part.float() for part in rotation)
    wider = torch.cat((torch.ones_like(x), x), dim=-2).flatten(-2).detach().requires_grad_()
    dy = gradient(x)
    (_, part), into = split_projection(wider, (4 * 32, 4 * 32))
    out = qk_norm.triton(part.unflatten(-1, (4, 32)), gain_C, EPS, rotation, into[1])
    got = torch.autograd.grad(out, (wider, gain_C), dy)
    exact = torch.autograd.grad(qk_norm.triton(x, gain_C, EPS, rotation), (x, gain_C), dy)
    assert torch.equal(got[0], torch.cat((torch.zeros_like(x), exact[0]), dim=-2).flatten(-2))
    assert torch.equal(got[1], exact[1])


def test_unsupported_arguments() -> None:
    x, gain_C = torch.randn(1, 2, 3, 9), torch.ones(9)
    with pytest.raises(ValueError, match="9 features have no two halves"):
        qk_norm(x, gain_C, EPS, kernel="triton")
    with pytest.raises(ValueError, match="wider than 2048"):
        qk_norm(torch.zeros(1, 2, 1, 2050), torch.ones(2050), EPS, kernel="triton")
    with pytest.raises(ValueError, match="float64"):
        qk_norm(x[..., :8].double(), gain_C[:8], EPS, kernel="triton")


@pytest.mark.parametrize(("S", "rows"), [(7, None), (7, 2), (0, 1)])
def test_opcheck(S: int, rows: int | None) -> None:
    """Schema, fake tensors, autograd registration and tracing, by torch's own checker."""
    x, gain_C, rotation = make(2, S, 2, 8, torch.float32, rows)
    angles = (None, None) if rotation is None else tuple(part.float() for part in rotation)
    torch.library.opcheck(qk_norm_triton.forward_op.op, (x, gain_C, EPS, *angles))
    arguments = (torch.ones_like(x), x.detach(), gain_C.detach(), EPS, *angles)
    torch.library.opcheck(qk_norm_triton.backward_op.op, arguments)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs the memory of a GPU")
def test_tokens_beyond_two_to_the_31() -> None:
    """The last tokens of a projection of more than 2³¹ numbers, and as many queries."""
    T, H, C = 2**31 // 1024 + 3, 8, 128
    x, gain_C = torch.randn(1, T, H, C, device=DEVICE, dtype=torch.bfloat16), torch.rand(C, device=DEVICE)
    angles = torch.rand(1, T, 1, C // 2, device=DEVICE)
    last = qk_norm.reference(x[:, -3:], gain_C, EPS, (angles[:, -3:], angles[:, -3:]))
    assert_close(qk_norm.triton(x, gain_C, EPS, (angles, angles))[:, -3:], last, BOUNDS[torch.bfloat16])
