"""The MoE layer against loops over tokens and experts in float64 (eq. 15-18 and 29-32).

Shapes: B batch, S sequence, T = B·S tokens, D width, E experts, F expert width, K active experts.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trinity.config.model import ModelConfig
from trinity.models.moe import Experts, MoE, Padding, Routing, local_dispatch

B, S = 2, 7


def make(config: ModelConfig) -> MoE:
    """A float64 layer of random weights, and a bias that changes choices."""
    torch.manual_seed(0)
    moe = MoE(config).double()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(moe.expert_bias, std=0.3)
    return moe


def tokens(config: ModelConfig) -> Tensor:
    return torch.randn(B, S, config.width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def swiglu(gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, x_D: Tensor) -> Tensor:
    gate_F = gate_FD @ x_D
    return down_DF @ (gate_F / (1 + (-gate_F).exp()) * (up_FD @ x_D))


def plain(moe: MoE, config: ModelConfig, x_BSD: Tensor) -> tuple[Tensor, list[list[int]], list[list[float]]]:
    """Outputs, and each token's chosen experts and scores."""
    outputs, chosen, scores = [], [], []
    for u in x_BSD.flatten(0, 1):
        s = [1 / (1 + math.exp(-(e @ u).item())) for e in moe.router.weight]
        biased = [s_i + b_i for s_i, b_i in zip(s, moe.expert_bias.tolist())]
        top = sorted(range(config.experts), key=lambda i: -biased[i])[: config.active_experts]
        y = swiglu(*moe.shared.gate_up.weight.chunk(2), moe.shared.down.weight, u)
        for i in top:
            gate = s[i] / sum(s[j] for j in top) * config.route_scale
            y = y + gate * swiglu(*moe.experts.gate_up[i], moe.experts.down[i], u)
        outputs.append(y)
        chosen.append(top)
        scores.append(s)
    return torch.stack(outputs).view_as(x_BSD), chosen, scores


@torch.no_grad()
def test_matches_loops(tiny: ModelConfig) -> None:
    """Outputs, counts, sequence loss and entropy; sums of a few dozen float64 products: 1e-12."""
    moe, x_BSD = make(tiny), tokens(tiny)
    y_BSD, routing = moe(x_BSD)
    expected, chosen, scores = plain(moe, tiny, x_BSD)
    assert torch.allclose(y_BSD, expected, rtol=0, atol=1e-12)

    E, K = tiny.experts, tiny.active_experts
    assert routing.counts_E.tolist() == [sum(row.count(i) for row in chosen) for i in range(E)]
    for b in range(B):
        rows = range(b * S, (b + 1) * S)
        f = [E / (K * S) * sum(chosen[t].count(i) for t in rows) for i in range(E)]
        P = [sum(scores[t][i] / sum(scores[t]) for t in rows) / S for i in range(E)]
        assert routing.sequence_loss_B[b].item() == pytest.approx(sum(a * p for a, p in zip(f, P)), abs=1e-13)
    shares = [[s / sum(row) for s in row] for row in scores]
    entropy = -sum(p * math.log(p) for row in shares for p in row)
    assert routing.entropy_sum.item() == pytest.approx(entropy, abs=1e-11)


@torch.no_grad()
def test_the_bias_affects_the_choice_alone(tiny: ModelConfig) -> None:
    """The same shift of every bias changes no bit of the output; a bias of ±10 on two experts sends all there."""
    moe, x_BSD = make(tiny), tokens(tiny)
    moe.expert_bias.copy_(torch.arange(6) / 4)
    before, _ = moe(x_BSD)
    moe.expert_bias.add_(2.0)
    after, _ = moe(x_BSD)
    assert torch.equal(before, after)
    moe.expert_bias.copy_(torch.tensor([-10.0, 10.0, 0.0, 0.0, 10.0, 0.0]))
    forced, routing = moe(x_BSD)
    assert routing.counts_E.tolist() == [0, B * S, 0, 0, B * S, 0]
    assert torch.allclose(forced, plain(moe, tiny, x_BSD)[0], rtol=0, atol=1e-12)


@torch.no_grad()
def test_gates_sum_to_the_route_scale(tiny: ModelConfig) -> None:
    """Eq. 18 normalises first; the scale comes after it."""
    moe, x_BSD = make(tiny), tokens(tiny)
    gates_TK, scores_TE, indices_TK, _ = moe.router(x_BSD.flatten(0, 1), moe.expert_bias)
    assert torch.allclose(gates_TK.sum(dim=1), torch.full((B * S,), 2.5, dtype=torch.float64), rtol=1e-14, atol=0)
    ratio = gates_TK[:, 0] / gates_TK[:, 1]
    chosen_TK = scores_TE.gather(1, indices_TK)
    assert torch.allclose(ratio, chosen_TK[:, 0] / chosen_TK[:, 1], rtol=1e-13, atol=0)


def test_gradients_against_finite_differences(tiny: ModelConfig) -> None:
    """Through experts, gates and shared expert to x and the router, torch's own tolerances; choices do not flip."""
    moe, x_BSD = make(tiny), tokens(tiny)[:, :2]
    names = ["router.weight", "experts.down", "shared.down.weight"]
    values = [moe.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def outputs(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        y, routing = torch.func.functional_call(moe, dict(zip(names, parameters)), (x,))
        return y, routing.sequence_loss_B

    torch.autograd.gradcheck(outputs, (x_BSD.requires_grad_(), *values), fast_mode=True)


def test_the_sequence_loss_reaches_the_router_only(tiny: ModelConfig) -> None:
    """And through the router the layer's input; not the experts."""
    moe, x_BSD = make(tiny), tokens(tiny).requires_grad_()
    routing: Routing = moe(x_BSD)[1]
    routing.sequence_loss_B.sum().backward()
    reached = [name for name, parameter in moe.named_parameters() if parameter.grad is not None]
    assert reached == ["router.weight"]
    assert moe.router.weight.grad.abs().sum() > 0
    assert not routing.entropy_sum.requires_grad


def test_another_dispatcher_gives_the_same(tiny: ModelConfig) -> None:
    """A dispatcher that runs the experts on two halves; it receives the routing, and the experts as a module."""
    moe, x_BSD = make(tiny), tokens(tiny)
    expected, _ = moe(x_BSD)
    calls, hooked = [], []
    moe.experts.register_forward_hook(lambda *_: hooked.append(True))

    def halves(
        x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor, experts: Experts, shared: Callable, padding: None
    ) -> Tensor:
        calls.append((x_TD, indices_TK, gates_TK, experts))
        parts = zip(x_TD.chunk(2), indices_TK.chunk(2), gates_TK.chunk(2))
        return shared() + torch.cat([experts(*part) for part in parts])

    assert moe.dispatcher is local_dispatch
    moe.dispatcher = halves
    actual, routing = moe(x_BSD)
    assert torch.allclose(actual, expected, rtol=0, atol=1e-12)  # matrix products of other shapes
    ((x_TD, indices_TK, gates_TK, experts),) = calls
    assert experts is moe.experts
    assert len(hooked) == 2
    assert torch.equal(x_TD, x_BSD.flatten(0, 1))
    assert indices_TK.flatten().bincount(minlength=6).tolist() == routing.counts_E.tolist()
    assert gates_TK.requires_grad


@pytest.mark.parametrize("rows", [(0, 7), (2, 0)])
def test_no_tokens(tiny: ModelConfig, rows: tuple[int, int]) -> None:
    """A rank without tokens is allowed: the output is empty, and every parameter still gets a gradient."""
    moe = make(tiny)
    x_BSD = torch.zeros(*rows, tiny.width, dtype=torch.float64)
    y_BSD, routing = moe(x_BSD)
    assert y_BSD.shape == x_BSD.shape
    assert routing.counts_E.tolist() == [0] * 6
    assert torch.equal(routing.sequence_loss_B, torch.zeros(rows[0], dtype=torch.float64))
    (y_BSD.sum() + routing.sequence_loss_B.sum()).backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in moe.parameters())


@pytest.mark.parametrize("lengths", [[2, 0], [7, 3], [7, 7]])
def test_padding_gets_the_shared_expert_alone(tiny: ModelConfig, lengths: list[int]) -> None:
    """Outputs and gradients of the other tokens are those without padding; two rows of different padding, and all.

    The layer alone on the other tokens, row by row; float64 sums of a few dozen products: 1e-12.
    """
    moe, x_BSD = make(tiny), tokens(tiny).requires_grad_()
    mask_BS = torch.arange(S) >= S - torch.tensor(lengths).unsqueeze(1)
    y_BSD, routing = moe(x_BSD, padding=Padding(mask_BS, sum(lengths)))
    assert torch.allclose(y_BSD[mask_BS], moe.shared(x_BSD[mask_BS]), rtol=0, atol=1e-12)
    parts = [moe(x_BSD[b : b + 1, : S - lengths[b]]) for b in range(B)]
    assert routing.counts_E.tolist() == sum(part.counts_E for _, part in parts).tolist()
    for b, (y, part) in enumerate(parts):
        assert torch.allclose(y_BSD[b, : S - lengths[b]], y[0], rtol=0, atol=1e-12)
        assert routing.sequence_loss_B[b].item() == pytest.approx(part.sequence_loss_B.item(), abs=1e-12)
    assert routing.entropy_sum.item() == pytest.approx(sum(part.entropy_sum.item() for _, part in parts), abs=1e-11)
    dy_BSD = torch.randn(B, S, tiny.width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    dy_BSD[mask_BS] = 0.0
    outputs = [(y_BSD * dy_BSD).sum() + routing.sequence_loss_B.sum()]
    outputs.append(sum((y[0] * dy_BSD[b, : S - lengths[b]]).sum() + part.sequence_loss_B.sum()
                       for b, (y, part) in enumerate(parts)))  # fmt: skip
    inputs = [x_BSD, *moe.parameters()]
    for got, expected in zip(*(torch.autograd.grad(output, inputs, materialize_grads=True) for output in outputs)):
        assert torch.allclose(got, expected, rtol=0, atol=1e-12)
    assert (
        torch.autograd.grad(moe(x_BSD, padding=Padding(mask_BS, sum(lengths)))[1].sequence_loss_B.sum(), x_BSD)[0][
            mask_BS
        ]
        .eq(0)
        .all()
    )
