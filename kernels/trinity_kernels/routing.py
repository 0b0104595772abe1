"""Top-K routing as one opaque custom op, so that recompute of a block in backward never routes again; and the gates.

route   the K experts with the largest score + bias (eq. 17), and the tokens per expert
gates   g = c · s / Σ chosen s: the scores without bias, normalised over the chosen, times the route scale c (eq. 18)

The choice has no gradient, so `route` returns indices and counts, and `gates` takes the scores again.
Saved for backward, by gates alone: scores and indices. Activation checkpointing keeps indices and counts
(`trinity.parallel.activation_checkpoint`), 8·K bytes per token, and computes scores and gates again, which would take
4·E. torch.compile and fake tensors see only the op's shapes.
Triton (routing_triton.py): K rounds of taking the largest score in place of topk; one kernel for the gates.

Shapes: T tokens, E experts, K active experts.
"""

import torch
from torch import Tensor

from trinity_kernels.op import Op

MOST_EXPERTS = 512
"""Most experts of the Triton kernels; at 1024 they spill registers."""

TINY = 1e-20
"""Added to the sum of the chosen scores, as in transformers, so that a token whose scores are all 0 divides by no 0."""


@torch.library.custom_op("trinity::route", mutates_args=())
def _route(scores_TE: Tensor, bias_E: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """The K experts of each token, and the number of tokens per expert.

    Args:
        scores_TE: [T, E] fp32 or float64, σ(logits); no gradient flows through this op.
        bias_E: [E], the balancing bias; it affects the choice alone.
        active: K.
    Returns:
        indices_TK [T, K] int64, highest biased score first; counts_E [E] int64, summing to T·K.
    """
    indices_TK = torch.topk(scores_TE + bias_E, active, dim=-1).indices
    counts_E = torch.zeros(scores_TE.shape[-1], dtype=torch.int64, device=scores_TE.device)
    counts_E.scatter_add_(0, indices_TK.flatten(), torch.ones_like(indices_TK).flatten())
    return indices_TK, counts_E


@_route.register_fake
def _(scores_TE: Tensor, bias_E: Tensor, active: int) -> tuple[Tensor, Tensor]:
    indices_TK = scores_TE.new_empty((scores_TE.shape[0], active), dtype=torch.int64)
    return indices_TK, scores_TE.new_empty((scores_TE.shape[1],), dtype=torch.int64)


def _gates(scores_TE: Tensor, indices_TK: Tensor, scale: float) -> Tensor:
    """Scores of the chosen, normalised over them, times the route scale (eq. 18).

    Args:
        scores_TE: [T, E] fp32 or float64; differentiable.
        indices_TK: [T, K] int64, distinct within a token.
        scale: the route scale.
    Returns:
        [T, K], the scores' dtype.
    """
    chosen_TK = scores_TE.gather(1, indices_TK)
    return chosen_TK / (chosen_TK.sum(dim=1, keepdim=True) + TINY) * scale


def _refuses(scores_TE: Tensor, *_: object) -> str | None:
    if scores_TE.dtype != torch.float32:
        return f"it takes scores in fp32, not {scores_TE.dtype}"
    if scores_TE.shape[1] > MOST_EXPERTS:
        return f"{scores_TE.shape[1]} experts are more than the {MOST_EXPERTS} that a program holds in its registers"
    return None


route = Op(_route, "trinity_kernels.routing_triton:route", _refuses, replayed=True)
gates = Op(_gates, "trinity_kernels.routing_triton:gates", _refuses)
