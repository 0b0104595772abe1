"""Expert balancing: the routing bias, the sequence-wise loss, and measures of router collapse.

A router picks the top K of s + b. The bias b, one number per expert, is not trained: an update rule changes it once per
optimizer step, from the number of tokens that each expert got in the global batch. There are two rules:

- sign (Nano and Mini, eq. 19-22): a step of fixed size γ towards balance, so it never converges.
- SMEBU (Large, eq. 23-28): a step that grows with the violation, is bounded by tanh, and is damped by momentum.

Both keep the mean of b at 0: only differences between experts affect the choice. The rules and measures are pure
functions of tensors and accept leading dimensions, e.g. layers. `next_biases` applies the config's rule to a model's
layers, and `set_biases` writes the result into them, once per optimizer step (trinity.training.train_step).

Shapes: M MoE layers, B sequences (packed rows), S tokens of one sequence, E experts, K experts chosen per token.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trinity.config.run import BalancingConfig
from trinity_kernels import routing


def smebu_update(
    bias: Tensor, momentum: Tensor, counts: Tensor, rate: float, kappa: float, beta: float
) -> tuple[Tensor, Tensor]:
    """One SMEBU step (eq. 23-28): v = (n̄−n)/n̄; Δ = λ·tanh(κ·v); Δ −= mean(Δ); m = β·m + (1−β)·Δ; b += m.

    Args:
        bias: [..., E], fp32 or float64: b.
        momentum: [..., E], bias's dtype: m, zeros before the first step.
        counts: [..., E], integer or floating: tokens sent to each expert in the global batch, n.
        rate: λ, in units of the scores (Large: 5e-4).
        kappa: κ, the slope of tanh at balance (Large: 2).
        beta: β, the decay of the momentum (Large: 0.5).
    Returns:
        The new bias and momentum, in bias's dtype; both unchanged for a layer without tokens.
    """
    violation, routed = _violation(counts)
    step = rate * torch.tanh(kappa * violation.to(bias.dtype))
    step = step - step.mean(dim=-1, keepdim=True)
    new_momentum = beta * momentum + (1 - beta) * step
    return torch.where(routed, bias + new_momentum, bias), torch.where(routed, new_momentum, momentum)


def sign_update(bias: Tensor, counts: Tensor, gamma: float) -> Tensor:
    """One aux-loss-free step with re-centring (eq. 19-22): b += γ·sign(n̄−n); b −= mean(b).

    Args:
        bias: [..., E], fp32 or float64: b.
        counts: [..., E], integer or floating: tokens sent to each expert in the global batch, n.
        gamma: γ, in units of the scores (not from the report, which gives none: 1e-3 is DeepSeek-V3's).
    Returns:
        The new bias, in bias's dtype; unchanged for a layer without tokens.
    """
    violation, routed = _violation(counts)
    moved = bias + gamma * violation.sign().to(bias.dtype)
    return torch.where(routed, moved - moved.mean(dim=-1, keepdim=True), bias)


def sequence_loss(
    scores_BSE: Tensor, indices_BSK: Tensor, padded: bool = False, row_counts_BE: Tensor | None = None
) -> Tensor:
    """The sequence-wise auxiliary loss of one MoE layer without its factor α: Σ_i f_i P_i (eq. 29-32).

    f_i = E/(K·S) · (times i was chosen in the row), a constant: counting has no gradient.
    P_i = mean over the row of s_i/Σ_j s_j, the only path of the gradient.
    A row whose tokens are spread evenly has f_i = 1, and so a loss of 1.

    Args:
        scores_BSE: [B, S, E], fp32 or float64: the router's sigmoid scores, without the bias.
        indices_BSK: [B, S, K], int64: the experts chosen by s + b; −1 for padding.
        padded: whether tokens may be padding, which enters neither f nor P nor S.
        row_counts_BE: [B, E] int64, how often each expert was chosen in the whole rows, if the tokens are a part of
            them (context parallelism); the result is then their share of the loss. None: the tokens are whole rows.
    Returns:
        [B], scores' dtype; 0 for rows of no tokens.
    """
    return routing.sequence_loss(scores_BSE, indices_BSK, padded, row_counts_BE)


def max_violation(counts: Tensor) -> Tensor:
    """MaxVio (eq. 42): (max_i n_i − n̄)/n̄, a sign of router collapse: flat for a long time, then rising suddenly.

    Args:
        counts: [..., E], integer or floating: tokens sent to each expert.
    Returns:
        [...], float64: 0 at perfect balance, E/K − 1 if K experts get all tokens; 0 for a layer without tokens.
    """
    violation, _ = _violation(counts)
    return -violation.amin(dim=-1)


def dead_share(counts: Tensor) -> Tensor:
    """Share of experts that got no token (dead experts).

    Args:
        counts: [..., E], integer or floating: tokens sent to each expert.
    Returns:
        [...], float64, from 0 to 1.
    """
    return (counts == 0).double().mean(dim=-1)


def _violation(counts: Tensor) -> tuple[Tensor, Tensor]:
    """(n̄−n)/n̄ as [..., E] in float64, 0 for a layer without tokens; and whether it has tokens, as [..., 1].

    In float64, because fp32 does not hold every count above 2²⁴, and an expert with exactly n̄ tokens must give 0.
    """
    counts = counts.double()
    mean = counts.mean(dim=-1, keepdim=True)
    routed = mean > 0
    return (mean - counts) / torch.where(routed, mean, 1.0), routed


class BalancedLayer(Protocol):
    """A layer with a balancing state, [E] fp32 each, which moves or not: trinity.models.moe.MoE."""

    expert_bias: Tensor
    expert_momentum: Tensor
    bias_moves: bool


class Biases(NamedTuple):
    """The balancing state after a step, on the device.

    bias_ME, momentum_ME: of every layer.
    counts_ME: tokens of the global batch, int64.
    ranges: [2] fp32, the largest max − min of a layer's biases, before and after the step.
    """

    bias_ME: Tensor
    momentum_ME: Tensor
    counts_ME: Tensor
    ranges: Tensor


@torch.no_grad()
def next_biases(layers: Sequence[BalancedLayer], counts_ME: Tensor | None, config: BalancingConfig) -> Biases | None:
    """Compute every layer's next expert bias from the counts of the global batch; None without MoE layers.

    Bias and momentum of a layer with a frozen router stay as they are.
    """
    if counts_ME is None:
        return None
    bias_ME = before_ME = torch.stack([layer.expert_bias for layer in layers])
    momentum_ME = still_ME = torch.stack([layer.expert_momentum for layer in layers])
    if config.kind == "smebu":
        bias_ME, momentum_ME = smebu_update(bias_ME, momentum_ME, counts_ME, config.rate, config.kappa, config.beta)
    elif config.kind == "sign":
        bias_ME = sign_update(bias_ME, counts_ME, config.gamma)
    for index, layer in enumerate(layers):
        if not layer.bias_moves:
            bias_ME[index], momentum_ME[index] = before_ME[index], still_ME[index]
    ranges = [(bias.amax(dim=1) - bias.amin(dim=1)).max() for bias in (before_ME, bias_ME)]
    return Biases(bias_ME, momentum_ME, counts_ME, torch.stack(ranges))


@torch.no_grad()
def set_biases(layers: Sequence[BalancedLayer], biases: Biases) -> None:
    """Write the next expert biases into the layers: once a step."""
    for layer, bias_E, momentum_E in zip(layers, biases.bias_ME, biases.momentum_ME):
        layer.expert_bias.copy_(bias_E)
        layer.expert_momentum.copy_(momentum_E)
