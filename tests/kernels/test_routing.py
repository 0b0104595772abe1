"""route against sorting each token's biased scores in Python.

Shapes: T tokens, E experts, K active experts.
"""

import pytest
import torch
from torch import Tensor

from trinity_kernels import route

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


def test_the_bias_moves_the_choice() -> None:
    """Without it expert 0 leads; with it expert 2 does."""
    scores_TE = torch.tensor([[0.9, 0.5, 0.6]])
    assert route(scores_TE, torch.zeros(3), 1)[0].tolist() == [[0]]
    assert route(scores_TE, torch.tensor([-0.2, 0.0, 0.2]), 1)[0].tolist() == [[2]]


def test_ties() -> None:
    """Which of equal experts is taken is torch.topk's business; that K different ones of the highest are is ours."""
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
