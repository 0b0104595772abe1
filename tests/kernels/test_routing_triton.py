"""Routing in Triton: choices and counts with sorting in Python, gates, statistics and their gradient with float64.

Shapes: T tokens, B rows of S tokens, E experts, K active experts.
"""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tests.kernels.triton_case import DEVICE, assert_close
from trinity.parallel.activation_checkpoint import SAVED, _policy
from trinity_kernels import route, routing_triton, weigh

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
    for function, scores in ((weigh.triton, scores_TE), (weigh.reference, scores_TE.double())):
        scores.requires_grad_()
        y, loss_B, _ = function(scores, indices_TK, 2.448)
        assert loss_B is None
        results.append((y, *torch.autograd.grad(y, scores, dy_TK.to(y.dtype))))
        scores.requires_grad_(False)
    (got, gradient), (exact, exact_gradient) = results
    assert_close(got, exact, 1e-6)
    if K > 1:
        assert_close(gradient, exact_gradient, 1e-6)
    else:  # a single gate equals the scale for any score: the gradient is rounding alone
        assert gradient.abs().max() <= 1e-5 if T else gradient.numel() == 0
    scores_TE.requires_grad_()
    total = weigh.triton(scores_TE, indices_TK, 2.448).gates_TK.sum()
    assert torch.autograd.grad(total, scores_TE)[0].abs().sum() <= 1e-4


ROWS = [(1, 7, 16, 4), (2, 17, 128, 8), (3, 16, 5, 2), (2, 40, 256, 4), (2, 9, 512, 4), (2, 300, 4, 2), (0, 5, 4, 2),
        (2, 0, 4, 2)]  # fmt: skip


@pytest.mark.parametrize(("B", "S", "E", "K"), ROWS)
def test_statistics_and_their_gradient(B: int, S: int, E: int, K: int) -> None:
    """fp32 sums of a few hundred positive numbers: 1e-6. Gradients of gates and loss alone and together.

    300 tokens of a row are more programs than `finish_kernel` reads at a time. A score of 0 has entropy 0.
    """
    scores_TE, bias_E = make(E, B * S)
    scores_TE[: B * S // 2, 0] = 0.0
    indices_TK = route.reference(scores_TE, bias_E, K)[0]
    random = torch.Generator().manual_seed(0)
    dy_TK, dloss_B = torch.randn(B * S, K, generator=random).to(DEVICE), torch.randn(B, generator=random).to(DEVICE)
    results = []
    for function, scores in ((weigh.triton, scores_TE), (weigh.reference, scores_TE.double())):
        scores.requires_grad_()
        gates_TK, loss_B, entropy_sum = function(scores, indices_TK, 2.448, B, True)
        gates_only = (gates_TK * dy_TK).sum()
        loss_only = (loss_B * dloss_B).sum()
        gradients = [
            torch.autograd.grad(total, scores, retain_graph=True)[0]
            for total in (gates_only, loss_only, gates_only + loss_only)
        ]
        assert not entropy_sum.requires_grad
        results.append((gates_TK, loss_B, entropy_sum, *gradients))
    for got, exact in zip(*results):
        assert_close(got, exact, 1e-6)


PADDED = [(2, 17, 128, 8, [3, 0]), (3, 16, 5, 2, [0, 16, 15]), (2, 40, 256, 4, [1, 20]), (2, 300, 4, 2, [299, 77])]
"""B, S, E, K, and the padding tokens at the end of each row."""


@pytest.mark.parametrize(("B", "S", "E", "K", "lengths"), PADDED)
def test_padding(B: int, S: int, E: int, K: int, lengths: list[int]) -> None:
    """Choices and counts exactly; gates, statistics and gradients to 1e-6 of the reference in float64.

    A row of padding alone, rows without padding, and rows whose padding begins inside a program's tokens.
    """
    scores_TE, bias_E = make(E, B * S)
    padding_T = (torch.arange(S) >= S - torch.tensor(lengths).unsqueeze(1)).flatten().to(DEVICE)
    indices_TK, counts_E = route.triton(scores_TE, bias_E, K, padding_T)
    alone_TK, alone_E = route.triton(scores_TE[~padding_T], bias_E, K)
    assert torch.equal(indices_TK[~padding_T], alone_TK)
    assert indices_TK[padding_T].eq(-1).all()
    assert torch.equal(counts_E, alone_E)
    random = torch.Generator().manual_seed(0)
    dy_TK, dloss_B = torch.randn(B * S, K, generator=random).to(DEVICE), torch.randn(B, generator=random).to(DEVICE)
    results = []
    for function, scores in ((weigh.triton, scores_TE), (weigh.reference, scores_TE.double())):
        scores.requires_grad_()
        gates_TK, loss_B, entropy_sum = function(scores, indices_TK, 2.448, B, True, True)
        gates_only, loss_only = (gates_TK * dy_TK).sum(), (loss_B * dloss_B).sum()
        gradients = [
            torch.autograd.grad(total, scores, retain_graph=True)[0]
            for total in (gates_only, loss_only, gates_only + loss_only)
        ]
        assert all(gradient[padding_T].eq(0).all() for gradient in gradients)
        assert gates_TK[padding_T].eq(0).all()
        plain = function(scores, indices_TK, 2.448, B, False, True)
        assert torch.equal(plain.gates_TK, gates_TK)
        results.append((gates_TK, loss_B, entropy_sum, *gradients))
    for got, exact in zip(*results):
        assert_close(got, exact, 1e-6)


@pytest.mark.parametrize(("B", "S", "E", "K"), ROWS)
def test_statistics_of_a_part_of_the_rows(B: int, S: int, E: int, K: int) -> None:
    """With the counts of whole rows, which are longer: as above, against the reference in float64."""
    scores_TE, bias_E = make(E, B * S)
    indices_TK = route.reference(scores_TE, bias_E, K)[0]
    counts_BE = torch.randint(9, (B, E), generator=torch.Generator().manual_seed(S)).to(DEVICE)
    counts_BE.scatter_add_(1, indices_TK.view(B, S * K), torch.ones_like(indices_TK).view(B, S * K))
    dloss_B = torch.randn(B, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results = []
    for function, scores in ((weigh.triton, scores_TE), (weigh.reference, scores_TE.double())):
        scores.requires_grad_()
        _, loss_B, entropy_sum = function(scores, indices_TK, 2.448, B, True, row_counts_BE=counts_BE)
        (gradient,) = torch.autograd.grad((loss_B * dloss_B).sum(), scores)
        results.append((loss_B, entropy_sum, gradient))
    for got, exact in zip(*results):
        assert_close(got, exact, 1e-6)


def test_without_padding_the_padded_kernels_give_the_same() -> None:
    """Choices and gates bit for bit; the loss to the rounding of its factor S/S."""
    scores_TE, bias_E = make(16, 32)
    indices_TK, counts_E = route.triton(scores_TE, bias_E, 4)
    padded = route.triton(scores_TE, bias_E, 4, torch.zeros(32, dtype=torch.bool, device=DEVICE))
    assert torch.equal(indices_TK, padded[0])
    assert torch.equal(counts_E, padded[1])
    one, other = (weigh.triton(scores_TE, indices_TK, 2.0, 2, True, flag) for flag in (False, True))
    assert torch.equal(one.gates_TK, other.gates_TK)
    assert torch.equal(one.entropy_sum, other.entropy_sum)
    assert_close(one.sequence_loss_B, other.sequence_loss_B, 1e-6)


def test_the_loss_is_computed_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the kernel that adds the sums of a row is not launched; entropy and gates keep their bits."""
    scores_TE, bias_E = make(16, 32)
    indices_TK = route.reference(scores_TE, bias_E, 4)[0]
    wanted = weigh.triton(scores_TE, indices_TK, 2.0, 2, True)
    monkeypatch.setattr(routing_triton, "finish_kernel", None)
    plain = weigh.triton(scores_TE, indices_TK, 2.0, 2, False)
    assert plain.sequence_loss_B is None
    assert torch.equal(plain.gates_TK, wanted.gates_TK)
    assert torch.equal(plain.entropy_sum, wanted.entropy_sum)
    with pytest.raises(TypeError):
        weigh.triton(scores_TE, indices_TK, 2.0, 2, True)


def test_rows_of_different_lengths_are_refused() -> None:
    scores_TE, bias_E = make(16, 7)
    indices_TK = route.reference(scores_TE, bias_E, 4)[0]
    with pytest.raises(ValueError, match="7 tokens are not 2 rows of the same length"):
        weigh.triton(scores_TE, indices_TK, 2.0, 2, True)


def test_recompute_keeps_the_route_and_weighs_again() -> None:
    """Under the policy of `recompute: block` the choice is made once; gradients have the same bits as without."""
    scores_TE, bias_E = make(16, 32)
    ran: list[str] = []

    def layer(scores_TE: Tensor) -> Tensor:
        indices_TK, _ = route.triton(scores_TE.detach(), bias_E, 4)
        gates_TK, loss_B, _ = weigh.triton(scores_TE.sigmoid(), indices_TK, 2.0, 2, True)
        return gates_TK.square().sum() + loss_B.square().sum()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            ran.append(op.name())
            return op(*args, **(kwargs or {}))

    scores_TE.requires_grad_()
    (expected,) = torch.autograd.grad(layer(scores_TE), scores_TE)
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, SAVED))
    with Record():
        y = checkpoint(layer, scores_TE, use_reentrant=False, context_fn=contexts)
        (gradient,) = torch.autograd.grad(y, scores_TE)
    assert torch.equal(gradient, expected)
    assert ran.count("trinity::route_triton") == 1
    assert ran.count("trinity::weigh_triton") == 2


def test_repetition_gives_the_same_bits() -> None:
    """Counts, and every sum of floats, in the order of the programs."""
    scores_TE, bias_E = make(16, 650)
    first, second = (route(scores_TE, bias_E, 4, kernel="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    first, second = (weigh(scores_TE, first[0], 2.0, 5, True, kernel="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("T", [0, 8])
def test_opcheck(T: int) -> None:
    """Schema, fake tensors, autograd registration and tracing, by torch's own checker."""
    scores_TE, bias_E = make(16, T)
    torch.library.opcheck(torch.ops.trinity.route_triton.default, (scores_TE, bias_E, 4))
    padding_T = torch.arange(T, device=DEVICE) > 5
    torch.library.opcheck(torch.ops.trinity.route_triton.default, (scores_TE, bias_E, 4, padding_T))
    indices_TK = route.reference(scores_TE, bias_E, 4)[0]
    counts_BE = torch.full((2, 16), 3, device=DEVICE)
    for options in ((False, False, None), (True, False, None), (True, True, None), (True, True, counts_BE)):
        arguments = scores_TE.requires_grad_(), indices_TK, 2.0, 2, *options
        torch.library.opcheck(torch.ops.trinity.weigh_triton.default, arguments)
