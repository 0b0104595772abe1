"""route against sorting each token's biased scores in Python; gates against eq. 18 in Python.

Shapes: T tokens, E experts, K active experts.
"""

import pytest
import torch
from torch import Tensor

from trinity_kernels import gates, route

SIZES = [(E, K, T) for E in (1, 4, 16, 128) for K in sorted({1, min(4, E), E}) for T in (0, 1, 7, 65)]


def make(E: int, T: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Scores as from a sigmoid, and a bias that changes choices."""
    random = torch.Generator().manual_seed(E + T)
    return torch.rand(T, E, generator=random, dtype=dtype), 0.3 * torch.randn(E, generator=random)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("E", "K", "T"), SIZES)
def test_matches_sorting(E: int, K: int, T: int, dtype: torch.dtype) -> None:
    """Indices exactly, highest biased score first (no two are equal here), and the counts."""
    scores_TE, bias_E = make(E, T, dtype)
    indices_TK, counts_E = route(scores_TE, bias_E, K)
    biased = (scores_TE + bias_E).tolist()
    expected = [sorted(range(E), key=lambda e: -row[e])[:K] for row in biased]
    assert indices_TK.shape == (T, K)
    assert indices_TK.tolist() == expected
    assert counts_E.tolist() == [sum(row.count(e) for row in expected) for e in range(E)]
    assert counts_E.sum().item() == T * K
    assert indices_TK.dtype == counts_E.dtype == torch.int64


def test_the_bias_changes_the_choice() -> None:
    """Without it expert 0 is chosen; with it expert 2."""
    scores_TE = torch.tensor([[0.9, 0.5, 0.6]])
    assert route(scores_TE, torch.zeros(3), 1)[0].tolist() == [[0]]
    assert route(scores_TE, torch.tensor([-0.2, 0.0, 0.2]), 1)[0].tolist() == [[2]]


def test_ties() -> None:
    """torch.topk decides between equal experts; route returns K different ones of the highest scores."""
    scores_TE = torch.randint(3, (50, 8), generator=torch.Generator().manual_seed(0)) / 4
    indices_TK, counts_E = route(scores_TE, torch.zeros(8), 4)
    chosen = [[row[e] for e in experts] for row, experts in zip(scores_TE.tolist(), indices_TK.tolist())]
    assert chosen == [sorted(row, reverse=True)[:4] for row in scores_TE.tolist()]
    assert all(len(set(experts)) == 4 for experts in indices_TK.tolist())
    assert counts_E.sum().item() == 200
    again = route(scores_TE, torch.zeros(8), 4)
    assert torch.equal(again[0], indices_TK)


@pytest.mark.parametrize("T", [0, 7])
def test_opcheck(T: int) -> None:
    """Schema, fake tensors and tracing of the custom op, by torch's own checker."""
    torch.library.opcheck(torch.ops.trinity.route.default, (*make(16, T), 4))


@pytest.mark.parametrize(("E", "K", "T"), [(1, 1, 7), (4, 4, 65), (16, 4, 0), (16, 4, 7), (128, 8, 63)])
def test_gates_are_the_chosen_scores_normalised_and_scaled(E: int, K: int, T: int) -> None:
    """In float64, to the rounding of sums of 8 terms; in fp32 to a few units in the last place, 6e-8 each."""
    scores_TE, bias_E = make(E, T, torch.float64)
    indices_TK, _ = route(scores_TE, bias_E, K)
    rows = zip(scores_TE.tolist(), indices_TK.tolist())
    expected = [[2.448 * row[e] / sum(row[i] for i in chosen) for e in chosen] for row, chosen in rows]
    exact_TK = torch.tensor(expected, dtype=torch.float64).view(T, K)
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 5e-7)):
        gates_TK = gates(scores_TE.to(dtype), indices_TK, 2.448)
        assert gates_TK.dtype == dtype
        torch.testing.assert_close(gates_TK.double(), exact_TK, rtol=bound, atol=0)


def test_gates_of_a_token_whose_scores_are_zero() -> None:
    """0 and not NaN."""
    assert gates(torch.zeros(1, 4), torch.tensor([[2, 0]]), 2.0).tolist() == [[0.0, 0.0]]


def test_gates_have_the_gradient_of_their_equation() -> None:
    """gradcheck in float64; the scores that were not chosen have none."""
    scores_TE, bias_E = make(8, 5, torch.float64)
    indices_TK, _ = route(scores_TE, bias_E, 3)
    scores_TE.requires_grad_()
    assert torch.autograd.gradcheck(lambda scores: gates(scores, indices_TK, 2.448), scores_TE)
    (gradient_TE,) = torch.autograd.grad(gates(scores_TE, indices_TK, 2.448)[:, 0].sum(), scores_TE)
    assert ((gradient_TE != 0).sum(dim=1) == 3).all()
    assert gradient_TE.scatter(1, indices_TK, 0).count_nonzero() == 0
