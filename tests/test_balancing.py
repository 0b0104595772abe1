"""The balancing rules against their equations, computed expert by expert with Python floats.

Shapes: B sequences, S tokens of one sequence, L layers, E experts, K experts chosen per token.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.balancing import dead_share, max_violation, sequence_loss, sign_update, smebu_update

LARGE = {"rate": 5e-4, "kappa": 2.0, "beta": 0.5}
# A few roundings of values below 1 (tanh, one mean, three sums): 2⁻⁵³ each in float64, 2⁻²⁴ in fp32.
BOUND = {torch.float64: 1e-15, torch.float32: 3e-7}

counts_lists = st.lists(st.integers(0, 10**7), min_size=2, max_size=17)


def plain_smebu(bias: list[float], momentum: list[float], counts: list[float], rate: float, kappa: float, beta: float):
    """Eq. 23-28, one expert after the other."""
    experts, mean = len(counts), sum(counts) / len(counts)
    step = [rate * math.tanh(kappa * (mean - n) / mean) for n in counts]
    centre = sum(step) / experts
    momentum = [beta * momentum[i] + (1 - beta) * (step[i] - centre) for i in range(experts)]
    return [bias[i] + momentum[i] for i in range(experts)], momentum


def plain_sign(bias: list[float], counts: list[float], gamma: float) -> list[float]:
    """Eq. 19-22, one expert after the other."""
    mean = sum(counts) / len(counts)
    moved = [b + gamma * ((mean > n) - (mean < n)) for b, n in zip(bias, counts)]
    return [b - sum(moved) / len(moved) for b in moved]


@given(
    rounds=st.integers(2, 17).flatmap(
        lambda e: st.lists(st.lists(st.integers(0, 10**7), min_size=e, max_size=e), min_size=1, max_size=4)
    ),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    floating=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_updates_follow_the_equations_over_several_steps(rounds, dtype, floating) -> None:
    experts = len(rounds[0])
    bias = momentum = torch.zeros(experts, dtype=dtype)
    signed = torch.linspace(-0.1, 0.2, experts, dtype=dtype)
    plain_bias, plain_momentum, plain_signed = bias.tolist(), momentum.tolist(), signed.tolist()
    for counts in rounds:
        tensor = torch.tensor(counts, dtype=torch.float64 if floating else torch.int64)
        bias, momentum = smebu_update(bias, momentum, tensor, **LARGE)
        signed = sign_update(signed, tensor, gamma=1e-3)
        if sum(counts):  # without tokens everything stays
            plain_bias, plain_momentum = plain_smebu(plain_bias, plain_momentum, counts, **LARGE)
            plain_signed = plain_sign(plain_signed, counts, gamma=1e-3)
    assert bias.dtype == momentum.dtype == signed.dtype == dtype
    for got, plain in ((bias, plain_bias), (momentum, plain_momentum), (signed, plain_signed)):
        torch.testing.assert_close(got.double(), torch.tensor(plain, dtype=torch.float64), rtol=0, atol=BOUND[dtype])


def test_float64_equals_to_the_last_digits() -> None:
    """λ is 5e-4, so the bounds above leave 12 digits; here relative to the result itself."""
    counts = [7, 0, 30, 3]
    bias, momentum = torch.tensor([[0.1, -0.2, 0.3, 0.0], [1e-4, 0.0, -2e-4, 1e-4]], dtype=torch.float64)
    new_bias, new_momentum = smebu_update(bias, momentum, torch.tensor(counts), 5e-4, 2.0, 0.25)
    plain_bias, plain_momentum = plain_smebu(bias.tolist(), momentum.tolist(), counts, 5e-4, 2.0, 0.25)
    torch.testing.assert_close(new_bias, torch.tensor(plain_bias, dtype=torch.float64), rtol=1e-14, atol=0)
    torch.testing.assert_close(new_momentum, torch.tensor(plain_momentum, dtype=torch.float64), rtol=1e-13, atol=0)


def test_layers_are_independent_and_a_layer_without_tokens_keeps_its_state() -> None:
    torch.manual_seed(0)
    counts_LE = torch.randint(0, 50, (3, 8))
    counts_LE[1] = 0
    bias_LE, momentum_LE = torch.randn(2, 3, 8)
    new_bias, new_momentum = smebu_update(bias_LE, momentum_LE, counts_LE, **LARGE)
    signed = sign_update(bias_LE, counts_LE, 1e-3)
    assert torch.equal(new_bias[1], bias_LE[1])
    assert torch.equal(new_momentum[1], momentum_LE[1])
    assert torch.equal(signed[1], bias_LE[1])
    for layer in (0, 2):
        alone = smebu_update(bias_LE[layer], momentum_LE[layer], counts_LE[layer], **LARGE)
        assert torch.equal(new_bias[layer], alone[0])
        assert torch.equal(new_momentum[layer], alone[1])
        assert torch.equal(signed[layer], sign_update(bias_LE[layer], counts_LE[layer], 1e-3))
        assert not torch.equal(new_bias[layer], bias_LE[layer])


def test_counts_beyond_fp32_are_exact() -> None:
    """2²⁴+1 is no fp32 number: rounded, the expert with exactly the mean would seem to differ from it."""
    counts = torch.tensor([2**24, 2**24 + 1, 2**24 + 2])
    assert sign_update(torch.zeros(3), counts, gamma=0.5).tolist() == [0.5, 0.0, -0.5]


def test_arguments_are_not_changed() -> None:
    bias, momentum, counts = torch.randn(4), torch.randn(4), torch.tensor([1, 2, 3, 4])
    before = bias.clone(), momentum.clone(), counts.clone()
    smebu_update(bias, momentum, counts, **LARGE)
    sign_update(bias, counts, 1e-3)
    assert all(torch.equal(x, y) for x, y in zip((bias, momentum, counts), before))


def plain_sequence_loss(scores: list, indices: list) -> float:
    """Eq. 29-32 for one row: scores [S][E], indices [S][K]."""
    tokens, experts, active = len(scores), len(scores[0]), len(indices[0])
    loss = 0.0
    for i in range(experts):
        f = experts / (active * tokens) * sum(chosen.count(i) for chosen in indices)
        loss += f * sum(row[i] / sum(row) for row in scores) / tokens
    return loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("B", "S", "E", "K"), [(1, 1, 2, 1), (3, 17, 8, 2), (2, 40, 5, 4)])
def test_sequence_loss_follows_the_equation(B, S, E, K, dtype) -> None:
    torch.manual_seed(1)
    scores_BSE = torch.rand(B, S, E, dtype=dtype)
    indices_BSK = (scores_BSE + torch.randn(E)).topk(K).indices  # by s + b, not by s
    loss_B = sequence_loss(scores_BSE, indices_BSK)
    plain = [plain_sequence_loss(scores_BSE[b].tolist(), indices_BSK[b].tolist()) for b in range(B)]
    assert loss_B.dtype == dtype
    # fp32: one division and two sums of at most 40 terms
    bound = 1e-14 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(loss_B.double(), torch.tensor(plain, dtype=torch.float64), rtol=bound, atol=0)


def test_sequence_loss_has_gradient_through_the_shares_alone() -> None:
    """dL/ds_tj = (f_j − Σ_i f_i p_ti) / (T Σ_i s_ti), with f a constant."""
    torch.manual_seed(2)
    B, S, E, K = 2, 9, 6, 2
    scores_BSE = torch.rand(B, S, E, dtype=torch.float64, requires_grad=True)
    indices_BSK = scores_BSE.detach().topk(K).indices
    sequence_loss(scores_BSE, indices_BSK).sum().backward()
    plain_BSE = torch.zeros(B, S, E, dtype=torch.float64)
    for b in range(B):
        f = [E / (K * S) * (indices_BSK[b] == i).sum().item() for i in range(E)]
        for t in range(S):
            s = scores_BSE[b, t].tolist()
            through_share = sum(f[i] * s[i] / sum(s) for i in range(E))
            for j in range(E):
                plain_BSE[b, t, j] = (f[j] - through_share) / (S * sum(s))
    torch.testing.assert_close(scores_BSE.grad, plain_BSE, rtol=0, atol=1e-14)


def test_sequence_loss_of_even_routing_is_one_and_of_no_tokens_zero() -> None:
    scores_BSE = torch.full((1, 4, 4), 0.25, dtype=torch.float64)
    assert sequence_loss(scores_BSE, torch.arange(4).view(1, 4, 1)).item() == 1.0
    assert sequence_loss(torch.zeros(2, 0, 4), torch.zeros(2, 0, 1, dtype=torch.int64)).tolist() == [0.0, 0.0]


@given(counts_lists)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_signals_follow_their_definitions(counts) -> None:
    mean = sum(counts) / len(counts)
    violation = max((n - mean) / mean for n in counts) if mean else 0.0
    assert max_violation(torch.tensor(counts)).item() == pytest.approx(violation, rel=1e-12, abs=1e-15)
    assert dead_share(torch.tensor(counts)).item() == pytest.approx(counts.count(0) / len(counts), rel=1e-15)


def test_signals_keep_the_layers_apart() -> None:
    counts_LE = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [0, 0, 0, 0], [8, 8, 0, 0]])
    assert max_violation(counts_LE).tolist() == [0.0, 3.0, 0.0, 1.0]
    assert dead_share(counts_LE).tolist() == [0.0, 0.75, 1.0, 0.5]
