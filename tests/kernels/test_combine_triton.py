"""combine against a loop in float64, the reference and Triton.

Shapes: T tokens, K places of a token, R rows, D width.
"""

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_case import DEVICE, relative_error
from trinity_kernels import combine
from trinity_kernels.combine import Places

# one rounding of the result, by half a unit in the last place: at most 2⁻⁸ in bf16 and 2⁻¹¹ in fp16, of a number just
# above a power of two; fp32 and float64 also round in sums of up to nine terms
BOUNDS = {torch.float64: 1e-15, torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
CASES = [(0, 2, 16), (1, 1, 5), (7, 8, 40), (65, 3, 1030), (300, 2, 16)]  # T, K, D


def make(T: int, K: int, D: int, share: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in any order, a share of the places without one, and plus, transposed."""
    random = torch.Generator().manual_seed(1000 * T + 10 * K + D)
    is_row_TK = torch.rand(T, K, generator=random) >= share
    R = int(is_row_TK.sum())
    place_TK = torch.full((T, K), -1)
    place_TK[is_row_TK] = torch.randperm(R, generator=random)
    rows_RD, plus_DT = torch.randn(R, D, generator=random), torch.randn(D, T, generator=random)
    return rows_RD.to(DEVICE, dtype), place_TK.to(DEVICE), plus_DT.to(DEVICE, dtype).t()


def implementations(dtype: torch.dtype) -> list:
    return [combine.reference] if dtype == torch.float64 else [combine.reference, combine.triton]


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("T", "K", "D"), CASES)
def test_matches_a_loop(T: int, K: int, D: int, share: float, dtype: torch.dtype) -> None:
    """With and without plus; a token without rows gives plus or zeros. The same bits twice."""
    rows_RD, place_TK, plus_TD = make(T, K, D, share, dtype)
    sums = [sum((rows_RD[p].double() for p in places if p >= 0), torch.zeros(D)) for places in place_TK.tolist()]
    exact_TD = torch.stack(sums).to(DEVICE) if T else torch.zeros(0, D)
    places = Places(place_TK, len(rows_RD))
    for function in implementations(dtype):
        for plus, expected in ((None, exact_TD), (plus_TD, exact_TD + plus_TD.double())):
            got = function(rows_RD, places, plus)
            assert got.dtype == dtype
            assert relative_error(got, expected) <= BOUNDS[dtype]
            assert torch.equal(got, function(rows_RD, places, plus))
        assert function(rows_RD, places)[(place_TK < 0).all(dim=1)].eq(0).all()


def test_both_add_in_the_order_of_places() -> None:
    """fp32: the same bits from the reference and from Triton."""
    for case in CASES:
        rows_RD, place_TK, plus_TD = make(*case, 0.3, torch.float32)
        inputs = rows_RD, Places(place_TK, len(rows_RD)), plus_TD
        assert torch.equal(combine.reference(*inputs), combine.triton(*inputs))


def test_float64_is_refused_by_triton() -> None:
    assert "not torch.float64" in combine._refuses(torch.zeros(1, 4, dtype=torch.float64), None)


def test_the_reference_runs_on_meta() -> None:
    """As a plan does, without knowing how many places hold a row."""
    rows_RD, place_TK, plus_TD = (x.to("meta") for x in make(7, 2, 8, 0.3, torch.bfloat16))
    assert combine(rows_RD, Places(place_TK, len(rows_RD)), plus_TD).shape == (7, 8)
