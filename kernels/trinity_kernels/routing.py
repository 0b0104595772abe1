"""Top-K routing as one opaque op, so that recomputing a block in backward never routes again; and the gates.

The choice is made on score + bias (eq. 17); gates are the unbiased scores of the chosen, normalised to sum 1, times the
route scale (eq. 18). So the choice needs no gradient: `route` returns indices and counts, and `gates` takes the scores
again. Activation checkpointing keeps the indices and counts (`trinity.parallel.recompute`) and makes scores and gates
anew, which are 4·E bytes a token against 8·K of indices; compile and fake tensors see an op's shapes only.

Shapes: T tokens, E experts, K active experts.
"""

import torch
from torch import Tensor

from trinity_kernels.op import Op

MOST_EXPERTS = 512
"""For the Triton kernels; at 1024 they spill."""

TINY = 1e-20
"""Added to the sum of the chosen scores, as in transformers: no token whose scores are all 0 divides by 0."""


@torch.library.custom_op("trinity::route", mutates_args=())
def _route(scores_TE: Tensor, bias_E: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """The K experts of each token, and how many tokens each expert got.

    Args:
        scores_TE: [T, E] fp32 or float64, σ(logits); no gradient flows through this op.
        bias_E: [E], the balancing bias; it moves the choice and nothing else.
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


route = Op(_route, "trinity_kernels.routing_triton:route", _refuses)
gates = Op(_gates, "trinity_kernels.routing_triton:gates", _refuses)
