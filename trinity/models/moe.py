"""The sparse MoE layer (eq. 15-18): sigmoid router with a balancing bias, routed experts, a shared expert.

- Logits, scores and gates in fp32 from fp32 weights, in any compute dtype.
- Top-K on score + bias. A gate is the score without the bias, normalised over the K chosen, times the route scale.
- y = shared(x) + Σ gate·FFN(x). The "+u" inside eq. 15 is not in the released model.
- Forward changes no state: it returns counts and losses, and trinity.balancing updates the bias once per step.
- The dispatcher sends tokens to their experts, on this rank or on others (trinity.parallel.token_dispatcher).
- Padding is routed to no expert: it gets the shared expert alone, and enters neither counts nor statistics.

Shapes: B batch, S sequence, T = B·S tokens, D width, E experts, F expert width, K active experts, R tokens that the
experts module receives.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

import trinity_kernels
from trinity.config.model import ModelConfig
from trinity.config.run import AUTOMATIC, KernelsConfig
from trinity.models.layers import SwiGLU
from trinity_kernels.expert_engines import ENGINES, engine

RowCounts = Callable[[Tensor], Tensor]
"""From counts over these tokens to counts over the whole rows, [B, E] int64 both; see row_parts.RowParts."""

RunExperts = Callable[..., Tensor]
"""The experts module as a function: (x_RD, indices_RK, gates_RK, rows, plus_RD) → [R, D]; see Experts."""


class Padding:
    """The padding tokens of a batch.

    A class, not a tuple: torch.compile compares the numbers in a tuple with those it compiled for.

    Args:
        mask_BS: [B, S] bool, true for padding.
        tokens: how many are, a number that the host knows, at least 1.
    """

    def __init__(self, mask_BS: Tensor, tokens: int) -> None:
        self.mask_BS, self.tokens = mask_BS, tokens


class Dispatcher(Protocol):
    """Sends tokens to their experts and brings the weighted sums back, with the shared expert's output in them."""

    def __call__(
        self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor, experts: RunExperts, shared: Callable[[], Tensor],
        padding: Padding | None = None,
    ) -> Tensor:  # fmt: skip
        """Run the shared expert and the chosen experts.

        Args:
            x_TD: tokens, any floating point; T may be 0.
            indices_TK: [T, K] int64, numbers among all experts of the layer; −1 for all choices of padding.
            gates_TK: [T, K] fp32 or float64, differentiable.
            experts: called exactly once, even without tokens, because every rank takes part in gathering its weights.
            shared: the shared expert on the same tokens, called once: [T, D], computed while the tokens are sent.
            padding: the tokens whose choices are −1; None: there are none.
        Returns:
            [T, D], shared's output plus each token's weighted sum over its experts, in x's dtype.
        """
        ...


def local_dispatch(
    x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor, experts: RunExperts, shared: Callable[[], Tensor],
    padding: Padding | None = None,
) -> Tensor:  # fmt: skip
    """The Dispatcher of a layer whose experts are all on this rank: nothing is sent."""
    if padding is None:
        return experts(x_TD, indices_TK, gates_TK, plus_TD=shared())
    return _without_padding(x_TD, indices_TK, gates_TK, experts, shared(), padding)


@torch.compiler.disable  # its shapes depend on the number of padding tokens
def _without_padding(
    x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor, experts: RunExperts, shared_TD: Tensor, padding: Padding
) -> Tensor:
    rows = indices_TK.numel() - padding.tokens * indices_TK.shape[1]
    return experts(x_TD, indices_TK, gates_TK, rows, shared_TD)


class Routing(NamedTuple):
    """Routing statistics of one MoE layer in one forward pass.

    Padding is in none of them.

    counts_E: [E] int64, tokens routed to each expert.
    sequence_loss_B: [B] fp32, Σ_i f_i·P_i of each row (eq. 29-32, without α), differentiable; None if not wanted. Where
        the tokens are a part of their rows, f is that of the whole row, and this is the part's share of the loss.
    entropy_sum: scalar fp32, Σ over tokens of the entropy of s_i/Σs in nats.
    """

    counts_E: Tensor
    sequence_loss_B: Tensor | None
    entropy_sum: Tensor


def counts_per_row(indices_TK: Tensor, counts_E: Tensor, rows: int) -> Tensor:
    """How often each expert was chosen in each row.

    Args:
        indices_TK: [T, K] int64, the choices; −1 is none.
        counts_E: their counts over all tokens.
        rows: B, equally long.
    Returns:
        [B, E] int64.
    """
    if rows == 1:
        return counts_E.unsqueeze(0)
    choices = indices_TK.view(rows, indices_TK.numel() // rows) + 1
    counts = choices.new_zeros(rows, len(counts_E) + 1).scatter_add_(1, choices, torch.ones_like(choices))
    return counts[:, 1:]


class Router(nn.Module):
    """Token-choice router: s = σ(W x)."""

    def __init__(self, config: ModelConfig, kernel: str = "auto") -> None:
        super().__init__()
        self.kernel = kernel
        self.active, self.route_scale = config.active_experts, config.route_scale
        self.weight = nn.Parameter(torch.empty(config.experts, config.width))
        self.roles = {"weight": ("router", (config.experts,))}

    def forward(
        self, x_TD: Tensor, bias_E: Tensor, rows: int = 1, with_sequence_loss: bool = True,
        padding: Padding | None = None, row_counts: RowCounts | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Routing]:  # fmt: skip
        """Choose K experts for each token.

        Args:
            x_TD: tokens, any floating point.
            bias_E: [E] fp32, the balancing bias.
            rows: B, the sequences that the tokens consist of.
            with_sequence_loss: compute the sequence-wise balancing loss.
            padding: tokens routed to no expert; their indices are −1, their gates 0. None: there are none.
            row_counts: where the tokens are a part of their rows; see Routing.
        Returns:
            gates_TK and scores_TE (fp32, or float64 for a float64 model; differentiable), indices_TK, the statistics.
        """
        scores_TE = self.scores(x_TD)
        padding_T = None if padding is None else padding.mask_BS.flatten()
        indices_TK, counts_E = trinity_kernels.route(
            scores_TE.detach(), bias_E, self.active, padding_T, kernel=self.kernel
        )
        row_counts_BE = None
        if with_sequence_loss and row_counts is not None:
            row_counts_BE = row_counts(counts_per_row(indices_TK, counts_E, rows))
        gates_TK, loss_B, entropy_sum = trinity_kernels.weigh(
            scores_TE,
            indices_TK,
            self.route_scale,
            rows,
            with_sequence_loss,
            padding is not None,
            row_counts_BE,
            kernel=self.kernel,
        )
        return gates_TK, scores_TE, indices_TK, Routing(counts_E, loss_B, entropy_sum)

    def scores(self, x_TD: Tensor) -> Tensor:
        """s = σ(W x) of all experts, [T, E]; fp32, or float64 for a float64 model."""
        # Triton has this product for bf16 alone: in fp32 and float64 it is torch's
        kernel = self.kernel if x_TD.dtype == torch.bfloat16 else "reference"
        return trinity_kernels.router_scores(x_TD, self.weight, kernel=kernel)


class Experts(nn.Module):
    """Weights of the routed experts, one SwiGLU network per expert, stacked along the first dimension.

    Attributes:
        local_part: function from a weight and `wide_gradient` to the part with this rank's experts: whole_weight,
            unless trinity.parallel.expert_parallel splits the experts.
        wide_gradient: keep the weights' gradients in fp32, for any dtype of the weights, so that Triton adds to them in
            place. trinity.parallel.grad_accumulation sets it where gradients stay on this rank over microbatches.
    """

    def __init__(self, config: ModelConfig, kernels: KernelsConfig = AUTOMATIC) -> None:
        super().__init__()
        self.kernel, self.keep_pre = kernels.experts, not kernels.experts_recompute
        experts, hidden, width = config.experts, config.expert_width, config.width
        self.gate_up = nn.Parameter(torch.empty(experts, 2, hidden, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))
        self.roles = {"gate_up": ("experts", (hidden,)), "down": ("experts", (width,))}
        self.local_part: Callable[[Tensor, bool], Tensor] = whole_weight
        self.wide_gradient = False

    def forward(
        self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor, rows: int | None = None, plus_TD: Tensor | None = None
    ) -> Tensor:
        """Weighted sum of the outputs of each token's experts on this rank.

        Args:
            x_TD: tokens, in the weights' dtype.
            indices_TK: [T, K] int64, numbers among this rank's experts; −1 for an expert on another rank.
            gates_TK: [T, K] fp32 or float64.
            rows: how many entries of indices_TK are not −1; None: all.
            plus_TD: added to the sums before they are rounded; None: nothing is added.
        Returns:
            [T, D], x's dtype.
        """
        gate_up, down = (self.local_part(weight, self.wide_gradient) for weight in (self.gate_up, self.down))
        arguments = (x_TD, gate_up, down, indices_TK, gates_TK, rows)
        if self.kernel in ENGINES:
            routed_TD = engine(self.kernel)(*arguments)
            return routed_TD if plus_TD is None else plus_TD + routed_TD
        return trinity_kernels.expert_mlp(*arguments, self.keep_pre, plus_TD, kernel=self.kernel)


def whole_weight(weight: Tensor, wide_gradient: bool) -> Tensor:
    """The weight itself; if wide_gradient, its gradient will be in fp32 at least."""
    if wide_gradient and weight.requires_grad:
        keep_gradient_wide(weight)
    return weight


@torch.compiler.disable  # Dynamo cannot trace grad_dtype
def keep_gradient_wide(weight: Tensor) -> None:
    """Keep the gradient of a leaf in fp32 at least, for any dtype of the leaf."""
    weight.grad_dtype = torch.promote_types(weight.dtype, torch.float32)


class MoE(nn.Module):
    """One MoE sublayer: router, routed experts, shared expert. The balancing state is in fp32 buffers.

    Attributes:
        bias_moves: whether training moves the expert bias; not with a frozen router (trinity.models.freeze).
    """

    def __init__(self, config: ModelConfig, kernels: KernelsConfig = AUTOMATIC) -> None:
        super().__init__()
        self.router = Router(config, kernels.routing)
        self.experts = Experts(config, kernels)
        self.shared = SwiGLU(config.width, config.shared_experts * config.expert_width, kernels.gate)
        self.expert_bias: Tensor
        self.expert_momentum: Tensor
        self.register_buffer("expert_bias", torch.empty(config.experts, dtype=torch.float32))
        self.register_buffer("expert_momentum", torch.empty(config.experts, dtype=torch.float32))
        self.dispatcher: Dispatcher = local_dispatch
        self.bias_moves = True

    def forward(
        self, x_BSD: Tensor, with_sequence_loss: bool = True, padding: Padding | None = None,
        row_counts: RowCounts | None = None,
    ) -> tuple[Tensor, Routing]:  # fmt: skip
        """[B, S, D] → the same shape and dtype, and the routing statistics; padding and row_counts as in Router."""
        x_TD = x_BSD.flatten(0, 1)
        gates_TK, _, indices_TK, routing = self.router(
            x_TD, self.expert_bias, len(x_BSD), with_sequence_loss, padding, row_counts
        )
        shared = partial(self.shared, x_TD)
        y_TD = self.dispatcher(x_TD, indices_TK, gates_TK, self.experts, shared=shared, padding=padding)
        return y_TD.view_as(x_BSD), routing
