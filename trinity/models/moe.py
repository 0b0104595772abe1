"""The sparse MoE layer (eq. 15-18): sigmoid router with a balancing bias, routed experts, a shared expert.

- Logits, scores and gates in fp32 from fp32 weights, whatever the model computes in.
- Top-K on score + bias; the gate is the score alone, normalised over the chosen to sum 1, times the route scale.
- y = shared(x) + Σ gate·FFN(x). The "+u" inside eq. 15 is not in the released model.
- Forward mutates nothing: counts and losses are returned, and the trainer updates the bias once a step.
- Whether the experts are all here is the dispatcher's business (trinity.models.dispatch).

Shapes: B batch, S sequence, T = B·S tokens, D width, E experts, F expert width, K active experts.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trinity_kernels
from trinity.balancing import sequence_loss
from trinity.config.model import ModelConfig
from trinity.config.run import AUTOMATIC, KernelsConfig
from trinity.models.layers import SwiGLU
from trinity.models.token_dispatcher import Dispatcher, local
from trinity_kernels.expert_engines import ENGINES, engine
from trinity_kernels.norm import wide


class Routing(NamedTuple):
    """What one MoE layer has to say about one forward pass.

    counts_E: [E] int64, tokens routed to each expert.
    sequence_loss_B: [B] fp32, Σ_i f_i·P_i of each row (eq. 29-32, without α), differentiable.
    entropy_sum: scalar fp32, Σ over tokens of the entropy of s_i/Σs in nats.
    """

    counts_E: Tensor
    sequence_loss_B: Tensor
    entropy_sum: Tensor


class Router(nn.Module):
    """Token-choice router: s = σ(W x)."""

    def __init__(self, config: ModelConfig, kernel: str = "auto") -> None:
        super().__init__()
        self.kernel = kernel
        self.active, self.route_scale = config.active_experts, config.route_scale
        self.weight = nn.Parameter(torch.empty(config.experts, config.width))
        self.roles = {"weight": ("router", (config.experts,))}

    def forward(self, x_TD: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Choose experts.

        Args:
            x_TD: tokens, any floating point.
            bias_E: [E] fp32.
        Returns:
            gates_TK and scores_TE (fp32, or float64 for a float64 model; differentiable), indices_TK, counts_E.
        """
        scores_TE = torch.sigmoid(F.linear(wide(x_TD), wide(self.weight)))
        indices_TK, counts_E = trinity_kernels.route(scores_TE.detach(), bias_E, self.active, kernel=self.kernel)
        gates_TK = trinity_kernels.gates(scores_TE, indices_TK, self.route_scale, kernel=self.kernel)
        return gates_TK, scores_TE, indices_TK, counts_E


class Experts(nn.Module):
    """The routed experts' weights, one SwiGLU network an expert, kept in three dimensions and more, never flattened.

    `here` takes of a weight the experts that are in this process: all, unless trinity.parallel.exchange splits them.
    `wide_gradient`: the weights' gradients are kept in fp32 whatever the weights are in, and Triton adds to them in
    place; trinity.parallel.accumulation says so where they stay on this rank over several microbatches.
    """

    def __init__(self, config: ModelConfig, kernels: KernelsConfig = AUTOMATIC) -> None:
        super().__init__()
        self.kernel, self.keep_pre = kernels.experts, not kernels.experts_recompute
        experts, hidden, width = config.experts, config.expert_width, config.width
        self.gate_up = nn.Parameter(torch.empty(experts, 2, hidden, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))
        self.roles = {"gate_up": ("experts", (hidden,)), "down": ("experts", (width,))}
        self.here: Callable[[Tensor], Tensor] = _all
        self.wide_gradient = False

    def forward(self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor, rows: int | None = None) -> Tensor:
        """Weighted sum of each token's experts that are here.

        Args:
            x_TD: tokens, in the weights' dtype.
            indices_TK: [T, K] int64, among the experts that are here; −1: elsewhere.
            gates_TK: [T, K] fp32 or float64.
            rows: how many choices are not −1; None: all.
        Returns:
            [T, D], x's dtype.
        """
        if self.wide_gradient and self.here is _all:
            _keep_gradients_wide(self.gate_up, self.down)
        gate_up, down = self.here(self.gate_up), self.here(self.down)
        arguments = (x_TD, gate_up, down, indices_TK, gates_TK, rows)
        if self.kernel in ENGINES:
            return engine(self.kernel)(*arguments)
        return trinity_kernels.expert_mlp(*arguments, self.keep_pre, kernel=self.kernel)


def _all(weight: Tensor) -> Tensor:
    return weight


@torch.compiler.disable  # Dynamo cannot trace grad_dtype
def _keep_gradients_wide(*weights: Tensor) -> None:
    for weight in weights:
        weight.grad_dtype = torch.promote_types(weight.dtype, torch.float32)


class MoE(nn.Module):
    """One MoE sublayer; holds the balancing state as fp32 buffers that no optimizer sees."""

    def __init__(self, config: ModelConfig, kernels: KernelsConfig = AUTOMATIC) -> None:
        super().__init__()
        self.router = Router(config, kernels.routing)
        self.experts = Experts(config, kernels)
        self.shared = SwiGLU(config.width, config.shared_experts * config.expert_width, kernels.gate)
        self.expert_bias: Tensor
        self.expert_momentum: Tensor
        self.register_buffer("expert_bias", torch.empty(config.experts, dtype=torch.float32))
        self.register_buffer("expert_momentum", torch.empty(config.experts, dtype=torch.float32))
        self.dispatcher: Dispatcher = local

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Routing]:
        """[B, S, D] → the same, and what the routing was."""
        x_TD = x_BSD.flatten(0, 1)
        gates_TK, scores_TE, indices_TK, counts_E = self.router(x_TD, self.expert_bias)
        shared = partial(self.shared, x_TD)
        routed_TD, shared_TD = self.dispatcher(x_TD, indices_TK, gates_TK, self.experts, meanwhile=shared)
        rows = x_BSD.shape[:2]
        balance_B = sequence_loss(scores_TE.unflatten(0, rows), indices_TK.unflatten(0, rows))
        return (shared_TD + routed_TD).view_as(x_BSD), Routing(counts_E, balance_B, _entropy_sum(scores_TE.detach()))


def _entropy_sum(scores_TE: Tensor) -> Tensor:
    shares = scores_TE / scores_TE.sum(dim=1, keepdim=True)
    return torch.special.entr(shares).sum()
