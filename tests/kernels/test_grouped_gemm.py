"""grouped_matmul and grouped_outer in bf16 on a CPU, padded to equal experts, against float64.

Shapes: R rows, E experts, O output width, I input width.
"""

import pytest
import torch

from trinity_kernels import grouped_gemm
from trinity_kernels.grouped_gemm import MOST_PADDING, grouped_matmul, grouped_outer

O, I = 24, 40
# one rounding of the result, 2⁻⁹, and sums of at most 300 exact products in fp32
BOUND = 4e-3
SIZES = {
    "equal": [33, 33, 33],
    "unequal": [1, 70, 0, 129, 0],
    "empty first and last": [0, 70, 300, 0],
    "one row": [0, 1, 0],
    "more padding than rows": [0] * 9 + [200] + [1] * 3,
}


@pytest.fixture(autouse=True)
def padded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Padded on every CPU; the shapes of the batches."""
    shapes = []
    monkeypatch.setattr(grouped_gemm, "pads", lambda _: True)
    bmm = torch.bmm

    def record(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        shapes.append(left.shape)
        return bmm(left, right)

    monkeypatch.setattr(torch, "bmm", record)
    return shapes


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_equals_float64(sizes: list[int], padded: list[torch.Size]) -> None:
    random = torch.Generator().manual_seed(0)
    left_RO, right_RI = (torch.randn(sum(sizes), width, generator=random).bfloat16() for width in (O, I))
    weight_EOI = torch.randn(len(sizes), O, I, generator=random).bfloat16()
    ends_E = torch.tensor(sizes).cumsum(0).int()
    got = [
        grouped_matmul.reference(right_RI, weight_EOI, ends_E, True),
        grouped_matmul.reference(left_RO, weight_EOI, ends_E, False),
        grouped_outer.reference(left_RO, right_RI, ends_E),
    ]
    lefts, rights = left_RO.double().split(sizes), right_RI.double().split(sizes)
    exact = [
        torch.cat([x @ weight.double().t() for x, weight in zip(rights, weight_EOI)]),
        torch.cat([x @ weight.double() for x, weight in zip(lefts, weight_EOI)]),
        torch.stack([x.t() @ y for x, y in zip(lefts, rights)]),
    ]
    assert all(((a.double() - b).norm() / b.norm()).item() < BOUND for a, b in zip(got, exact))
    assert all(got[2][expert].eq(0).all() for expert, size in enumerate(sizes) if not size)
    fits = len(sizes) * max(sizes) <= MOST_PADDING * sum(sizes)
    assert len(padded) == (3 if fits else 0)


@pytest.mark.parametrize("sizes", [[3, 2, 4], [0, 0, 0]])
def test_rows_past_the_last_expert(sizes: list[int]) -> None:
    """They are undefined in a product, and in no expert's sum."""
    random = torch.Generator().manual_seed(0)
    rows_RI = torch.randn(sum(sizes) + 5, I, generator=random).bfloat16()
    weight_EOI = torch.randn(len(sizes), O, I, generator=random).bfloat16()
    ends_E = torch.tensor(sizes).cumsum(0).int()
    out_RO = grouped_matmul.reference(rows_RI, weight_EOI, ends_E, True)
    assert out_RO.shape == (len(rows_RI), O)
    used = sum(sizes)
    if used:
        exact = grouped_matmul.reference(rows_RI[:used], weight_EOI, ends_E, True)
        assert torch.equal(out_RO[:used], exact)
    outer = grouped_outer.reference(out_RO, rows_RI, ends_E)
    assert outer.shape == weight_EOI.shape
    assert used or outer.eq(0).all()


def test_another_routing_compiles_no_other_kernel(padded: list[torch.Size]) -> None:
    """512 experts' loads between 1 and 2048 rows make fewer than a hundred shapes, each at most a seventh larger."""
    for most in range(1, 2049, 4):
        ends_E = torch.tensor([most, 2 * most]).int()
        grouped_matmul.reference(torch.zeros(2 * most, 1).bfloat16(), torch.zeros(2, 1, 1).bfloat16(), ends_E, True)
        assert most <= padded[-1][1] <= max(most + 1, most * 8 / 7)
    assert len(set(padded)) < 100
