"""Grouped products, Triton's and the references, against one product per expert in float64.

Shapes: R rows, E experts, O output width, I input width.
"""

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_case import BOUNDS, DEVICE, assert_close
from trinity_kernels import grouped_gemm_triton, grouped_linear, grouped_matmul, grouped_outer
from trinity_kernels.grouped_gemm_triton import Tile

SIZES = [[7], [0, 5, 0, 33, 16], [64, 0, 1], [0, 0, 17]]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, so that few rows fill and overflow them; on a GPU too, so that the same code runs."""
    monkeypatch.setattr(grouped_gemm_triton, "matmul_tile", lambda *_: Tile(16, 32, 16, 4, 2))
    monkeypatch.setattr(grouped_gemm_triton, "outer_tile", lambda *_: Tile(32, 32, 16, 4, 2))


def make(sizes: list[int], O: int, I: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [R, I], grad [R, O], weight [E, O, I], ends [E]."""
    random = torch.Generator().manual_seed(sum(sizes) + O)
    shapes = [(sum(sizes), I), (sum(sizes), O), (len(sizes), O, I)]
    tensors = [torch.randn(shape, generator=random).to(DEVICE, dtype) for shape in shapes]
    return *tensors, torch.tensor(sizes, device=DEVICE).cumsum(0).to(torch.int32)


def by_expert(x: Tensor, ends_E: Tensor) -> list[Tensor]:
    ends = ends_E.tolist()
    return [x[start:end].double() for start, end in zip([0, *ends[:-1]], ends)]


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize(("O", "I"), [(40, 72), (32, 16)])
@pytest.mark.parametrize("sizes", SIZES)
def test_against_one_product_per_expert(sizes: list[int], O: int, I: int, dtype: torch.dtype) -> None:
    x_RI, grad_RO, weight_EOI, ends_E = make(sizes, O, I, dtype)
    pairs = list(zip(by_expert(x_RI, ends_E), by_expert(grad_RO, ends_E), weight_EOI.double()))
    exact = [
        torch.cat([x @ w.t() for x, _, w in pairs]),
        torch.cat([g @ w for _, g, w in pairs]),
        torch.stack([g.t() @ x for x, g, _ in pairs]),
    ]
    for pick in ("triton", "reference"):
        got = [
            grouped_matmul(x_RI, weight_EOI, ends_E, True, kernel=pick),
            grouped_matmul(grad_RO, weight_EOI, ends_E, False, kernel=pick),
            grouped_outer(grad_RO, x_RI, ends_E, kernel=pick),
        ]
        assert all(a.dtype == dtype for a in got)
        for a, b in zip(got, exact):
            assert_close(a, b, BOUNDS[dtype])


@pytest.mark.parametrize("gathered", ["left", "right"])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_gathered_rows_added_to_an_existing_gradient(gathered: str, dtype: torch.dtype) -> None:
    """Row r of the gathered side is row order[r] // 2; the sum is added in fp32 to an existing gradient."""
    x_RI, grad_RO, _, ends_E = make([9, 0, 23], 40, 24, dtype)
    order_R = torch.randperm(32, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.int32)
    token_R = (order_R // 2).long()
    left, right = (grad_RO[:16], x_RI) if gathered == "left" else (grad_RO, x_RI[:16])
    rows = (left[token_R], right) if gathered == "left" else (left, right[token_R])
    exact = torch.stack([a.t() @ b for a, b in zip(*(by_expert(x, ends_E) for x in rows))])
    into = torch.randn(3, 40, 24, device=DEVICE)
    before = into.clone()
    in_fp32 = grouped_gemm_triton.outer(left, right, ends_E, order_R, 2, gathered, dtype=torch.float32)
    grouped_gemm_triton.outer(left, right, ends_E, order_R, 2, gathered, into=into)
    assert in_fp32.dtype == torch.float32
    assert_close(in_fp32, exact, 1e-5)  # sums and result in fp32, for any dtype of the rows
    assert_close(into, before.double() + exact, 1e-5)
    assert torch.equal(into[1], before[1])


def test_rows_past_the_last_expert_have_no_effect() -> None:
    """NaN in rows of no expert reaches neither products nor sums."""
    x_RI, grad_RO, weight_EOI, ends_E = make([9, 14], 40, 24, torch.float32)
    longer = [torch.cat((x, torch.full_like(x[:9], torch.nan))) for x in (x_RI, grad_RO)]
    out = grouped_matmul(longer[0], weight_EOI, ends_E, True, kernel="triton")
    assert torch.equal(out[:23], grouped_matmul(x_RI, weight_EOI, ends_E, True, kernel="triton"))
    sums = grouped_outer(longer[1], longer[0], ends_E, kernel="triton")
    assert torch.equal(sums, grouped_outer(grad_RO, x_RI, ends_E, kernel="triton"))


def test_linear_is_differentiable_in_float64() -> None:
    """Finite differences, torch's own tolerances; the middle expert has no rows."""
    x_RI, _, weight_EOI, ends_E = make([3, 0, 2], 5, 4, torch.float64)
    inputs = (x_RI.requires_grad_(), weight_EOI.requires_grad_())
    torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, ends_E, "reference"), inputs)


def test_linear_takes_a_gradient_of_stride_zero() -> None:
    x_RI, _, weight_EOI, ends_E = make([5, 11], 40, 24, torch.float32)
    results = []
    for kernel in ("triton", "reference"):
        inputs = x_RI.clone().requires_grad_(), weight_EOI.clone().requires_grad_()
        results.append(torch.autograd.grad(grouped_linear(*inputs, ends_E, kernel).sum(), inputs))
    for a, b in zip(*results):
        assert_close(a, b, 1e-5)


def test_unsupported_arguments() -> None:
    x_RI, _, weight_EOI, ends_E = make([5], 40, 6, torch.float32)
    with pytest.raises(ValueError, match="rows of 6 numbers are no multiple of 16 bytes; use auto or reference"):
        grouped_matmul(x_RI, weight_EOI, ends_E, True, kernel="triton")
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        grouped_matmul(x_RI.double(), weight_EOI.double(), ends_E, True, kernel="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repetition_gives_the_same_bits(dtype: torch.dtype) -> None:
    x_RI, grad_RO, weight_EOI, ends_E = make([40, 3], 40, 24, dtype)
    runs = [
        (
            grouped_matmul(x_RI, weight_EOI, ends_E, True, kernel="triton"),
            grouped_gemm_triton.outer(grad_RO, x_RI, ends_E),
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
