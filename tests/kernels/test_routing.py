"""route against sorting each token's biased scores in Python; weigh against eq. 18 and 29-32 in Python.

Shapes: T tokens, B rows of S tokens, E experts, K active experts.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trinity_kernels import route, weigh

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
        gates_TK, loss_B, _ = weigh(scores_TE.to(dtype), indices_TK, 2.448)
        assert gates_TK.dtype == dtype
        assert loss_B is None
        torch.testing.assert_close(gates_TK.double(), exact_TK, rtol=bound, atol=0)


def test_gates_of_a_token_whose_scores_are_zero() -> None:
    """0 and not NaN."""
    assert weigh(torch.zeros(1, 4), torch.tensor([[2, 0]]), 2.0).gates_TK.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(("B", "S", "E", "K"), [(1, 7, 6, 2), (3, 5, 6, 2), (2, 4, 1, 1), (2, 3, 4, 4)])
def test_statistics_are_those_of_loops(B: int, S: int, E: int, K: int) -> None:
    """Σ f·P of each row (eq. 29-32) and the entropy's sum, by expert and token in Python floats; 1e-14 of each."""
    scores_TE, bias_E = make(E, B * S, torch.float64)
    indices_TK, _ = route(scores_TE, bias_E, K)
    _, loss_B, entropy_sum = weigh(scores_TE, indices_TK, 2.0, B, True)
    shares = [[s / sum(row) for s in row] for row in scores_TE.tolist()]
    assert loss_B.shape == (B,)
    for b in range(B):
        tokens, chosen = range(b * S, (b + 1) * S), indices_TK[b * S : (b + 1) * S].flatten().tolist()
        f = [E / (K * S) * chosen.count(i) for i in range(E)]
        P = [sum(shares[t][i] for t in tokens) / S for i in range(E)]
        assert loss_B[b].item() == pytest.approx(sum(x * y for x, y in zip(f, P)), rel=1e-14)
    entropy = -sum(p * math.log(p) for row in shares for p in row)
    assert entropy_sum.item() == pytest.approx(entropy, rel=1e-14, abs=1e-14)


@pytest.mark.parametrize(("B", "T"), [(0, 0), (2, 0)])
def test_statistics_of_no_tokens(B: int, T: int) -> None:
    scores_TE, indices_TK = torch.zeros(T, 4, requires_grad=True), torch.zeros(T, 2, dtype=torch.int64)
    gates_TK, loss_B, entropy_sum = weigh(scores_TE, indices_TK, 2.0, B, True)
    assert (gates_TK.shape, loss_B.tolist(), entropy_sum.item()) == ((T, 2), [0.0] * B, 0.0)
    (gates_TK.sum() + loss_B.sum()).backward()
    assert scores_TE.grad.shape == (T, 4)


def test_gates_and_loss_have_the_gradient_of_their_equation() -> None:
    """gradcheck in float64; a gate has no gradient to scores not chosen, the loss has; the entropy has none."""
    scores_TE, bias_E = make(8, 6, torch.float64)
    indices_TK, _ = route(scores_TE, bias_E, 3)
    scores_TE.requires_grad_()
    assert torch.autograd.gradcheck(lambda scores: weigh(scores, indices_TK, 2.448, 2, True)[:2], scores_TE)
    gates_TK, loss_B, entropy_sum = weigh(scores_TE, indices_TK, 2.448, 2, True)
    (gradient_TE,) = torch.autograd.grad(gates_TK[:, 0].sum(), scores_TE)
    assert ((gradient_TE != 0).sum(dim=1) == 3).all()
    assert gradient_TE.scatter(1, indices_TK, 0).count_nonzero() == 0
    assert torch.autograd.grad(loss_B.sum(), scores_TE)[0].count_nonzero() == scores_TE.numel()
    assert not entropy_sum.requires_grad


PADDED_ROWS = [(1, 7, 6, 2, [3]), (3, 5, 6, 2, [0, 5, 2]), (2, 4, 1, 1, [1, 4]), (2, 3, 4, 4, [2, 0])]
"""B, S, E, K, and the padding tokens at the end of each row."""


def padding_of(S: int, lengths: list[int]) -> Tensor:
    """[B·S] bool."""
    return (torch.arange(S) >= S - torch.tensor(lengths).unsqueeze(1)).flatten()


@pytest.mark.parametrize(("B", "S", "E", "K", "lengths"), PADDED_ROWS)
def test_padding_is_routed_to_no_expert(B: int, S: int, E: int, K: int, lengths: list[int]) -> None:
    """Its choices are −1; the others and the counts are those of the other tokens alone."""
    scores_TE, bias_E = make(E, B * S)
    padding_T = padding_of(S, lengths)
    indices_TK, counts_E = route(scores_TE, bias_E, K, padding_T)
    alone_TK, alone_E = route(scores_TE[~padding_T], bias_E, K)
    assert torch.equal(indices_TK[~padding_T], alone_TK)
    assert torch.equal(counts_E, alone_E)
    assert indices_TK[padding_T].eq(-1).all()
    torch.library.opcheck(torch.ops.trinity.route.default, (scores_TE, bias_E, K, padding_T))


@pytest.mark.parametrize(("B", "S", "E", "K", "lengths"), PADDED_ROWS)
def test_padding_enters_no_statistic(B: int, S: int, E: int, K: int, lengths: list[int]) -> None:
    """Gates, loss of each row, entropy and gradient are those of the row's other tokens alone; in float64, 1e-14."""
    scores_TE, bias_E = make(E, B * S, torch.float64)
    padding_T = padding_of(S, lengths)
    indices_TK, _ = route(scores_TE, bias_E, K, padding_T)
    dy_TK = torch.randn(B * S, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores_TE.requires_grad_()
    gates_TK, loss_B, entropy_sum = weigh(scores_TE, indices_TK, 2.448, B, True, True)
    ((gates_TK * dy_TK).sum() + (loss_B * torch.arange(1, B + 1)).sum()).backward()
    assert gates_TK[padding_T].eq(0).all()
    assert scores_TE.grad[padding_T].eq(0).all()
    entropy = 0.0
    for b in range(B):
        row = slice(b * S, (b + 1) * S - lengths[b])
        alone_TE = scores_TE.detach()[row].requires_grad_()
        gates, loss, row_entropy = weigh(alone_TE, indices_TK[row], 2.448, 1, True)
        ((gates * dy_TK[row]).sum() + (b + 1) * loss.sum()).backward()
        assert torch.allclose(gates_TK[row], gates, rtol=1e-14, atol=0)
        assert loss_B[b].item() == pytest.approx(loss.item(), rel=1e-14)
        assert torch.allclose(scores_TE.grad[row], alone_TE.grad, rtol=0, atol=1e-14)
        entropy += row_entropy.item()
    assert entropy_sum.item() == pytest.approx(entropy, rel=1e-14)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_shares_of_the_parts_of_rows_add_up(parts: int) -> None:
    """Loss, its gradient and the gates of rows in parts, given the counts of whole rows: those of whole rows."""
    B, S, E, K = 3, 20, 6, 2
    scores_TE = torch.rand(B * S, E, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    indices_TK = scores_TE.detach().topk(K).indices
    whole = weigh(scores_TE, indices_TK, 2.0, B, True)
    expected = torch.autograd.grad(whole.sequence_loss_B.sum(), scores_TE)[0]
    counts_BE = F.one_hot(indices_TK.view(B, -1), E).sum(dim=1)
    scores, indices = (x.view(B, parts, S // parts, -1) for x in (scores_TE, indices_TK))
    shares = [
        weigh(scores[:, part].flatten(0, 1), indices[:, part].flatten(0, 1), 2.0, B, True, row_counts_BE=counts_BE)
        for part in range(parts)
    ]
    total_B = torch.stack([share.sequence_loss_B for share in shares]).sum(dim=0)
    torch.testing.assert_close(total_B, whole.sequence_loss_B, rtol=1e-14, atol=0)
    actual = torch.autograd.grad(total_B.sum(), scores_TE)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-16)
    gates = torch.stack([share.gates_TK.view(B, S // parts, K) for share in shares], dim=1)
    assert torch.equal(gates.flatten(0, 2), whole.gates_TK)
