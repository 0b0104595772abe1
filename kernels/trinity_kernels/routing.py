"""Top-K routing as one opaque op, so that recomputing a block in backward never routes again.

The choice is made on score + bias (eq. 17); gates are the unbiased scores of the chosen. So the op needs no gradient:
it returns indices and counts, and the gates are gathered outside it. Activation checkpointing keeps its outputs
(`trinity.parallel.recompute`); compile and fake tensors see its shapes only.

Shapes: T tokens, E experts, K active experts.
"""

import torch
from torch import Tensor

from trinity_kernels.op import Op


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


route = Op(_route)
