"""Routing in Triton: choices and counts with sorting in Python, gates and their gradient with float64.

Shapes: T tokens, E experts, K active experts.
"""

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_case import DEVICE, assert_close
from trinity_kernels import gates, route

SIZES = [(1, 1, 7), (4, 4, 65), (4, 1, 1), (6, 2, 16), (128, 8, 63), (128, 1, 17), (256, 4, 129), (16, 4, 0)]


def make(E: int, T: int) -> tuple[Tensor, Tensor]:
    """Scores as from a sigmoid, and a bias that changes choices."""
    random = torch.Generator().manual_seed(E + T)
    return torch.rand(T, E, generator=random).to(DEVICE), (0.3 * torch.randn(E, generator=random)).to(DEVICE)


@pytest.mark.parametrize(("E", "K", "T"), SIZES)
def test_matches_sorting(E: int, K: int, T: int) -> None:
    """Exactly, the first of equal scores first: Python's sort is stable."""
    scores_TE, bias_E = make(E, T)
    scores_TE = scores_TE.mul(8).round().div(8) if E == 6 else scores_TE  # many ties
    indices_TK, counts_E = route(scores_TE, bias_E if E != 6 else torch.zeros_like(bias_E), K, kernel="triton")
    biased = (scores_TE + (bias_E if E != 6 else 0)).tolist()
    expected = [sorted(range(E), key=lambda e: -row[e])[:K] for row in biased]
    assert indices_TK.tolist() == expected
    assert counts_E.tolist() == [sum(row.count(e) for row in expected) for e in range(E)]
    assert indices_TK.dtype == counts_E.dtype == torch.int64
    assert indices_TK.shape == (T, K)


def test_nan_comes_last_and_names_no_expert_twice() -> None:
    scores_TE, bias_E = make(8, 20)
    scores_TE[3] = torch.nan
    scores_TE[5, 2:] = torch.nan
    indices_TK, counts_E = route(scores_TE, bias_E, 4, kernel="triton")
    assert indices_TK[3].tolist() == [0, 1, 2, 3]
    assert set(indices_TK[5, :2].tolist()) == {0, 1}
    assert all(len(set(row)) == 4 for row in indices_TK.tolist())
    assert counts_E.sum().item() == 80


@pytest.mark.parametrize(("E", "K", "T"), SIZES)
def test_gates_and_their_gradient(E: int, K: int, T: int) -> None:
    """fp32 sums of at most 8 terms: 1e-6 is a few roundings; the gradient of stride zero as from sum() is 0 then."""
    scores_TE, bias_E = make(E, T)
    indices_TK = route.reference(scores_TE, bias_E, K)[0]
    dy_TK = torch.randn(T, K, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results = []
    for function, scores in ((gates.triton, scores_TE), (gates.reference, scores_TE.double())):
        scores.requires_grad_()
        y = function(scores, indices_TK, 2.448)
        results.append((y, *torch.autograd.grad(y, scores, dy_TK.to(y.dtype))))
        scores.requires_grad_(False)
    (got, gradient), (exact, exact_gradient) = results
    assert_close(got, exact, 1e-6)
    if K > 1:
        assert_close(gradient, exact_gradient, 1e-6)
    else:  # a single gate equals the scale for any score: the gradient is rounding alone
        assert gradient.abs().max() <= 1e-5 if T else gradient.numel() == 0
    scores_TE.requires_grad_()
    total = gates.triton(scores_TE, indices_TK, 2.448).sum()
    assert torch.autograd.grad(total, scores_TE)[0].abs().sum() <= 1e-4


def test_repetition_gives_the_same_bits() -> None:
    scores_TE, bias_E = make(16, 65)
    first, second = (route(scores_TE, bias_E, 4, kernel="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("T", [0, 7])
def test_opcheck(T: int) -> None:
    """Schema, fake tensors, autograd registration and tracing, by torch's own checker."""
    scores_TE, bias_E = make(16, T)
    torch.library.opcheck(torch.ops.trinity.route_triton.default, (scores_TE, bias_E, 4))
    indices_TK = route.reference(scores_TE, bias_E, 4)[0]
    torch.library.opcheck(torch.ops.trinity.gates_triton.default, (scores_TE.requires_grad_(), indices_TK, 2.0))
