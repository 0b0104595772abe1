"""Top-K routing as one opaque custom op, so that recompute of a block in backward never routes again; and the gates.

route   the K experts with the largest score + bias (eq. 17), and the tokens per expert
weigh   the gates g = c · s / Σ chosen s: the scores without bias, normalised over the chosen, times the route scale c
        (eq. 18); and what is reported about the same scores: the sequence-wise balancing loss of each row (eq. 29-32)
        and the entropy of s/Σs, summed over tokens

The choice has no gradient, so `route` returns indices and counts, and `weigh` takes the scores again.
A padding token is routed to no expert: its choices are −1 and its gates 0, and it enters neither counts, sequence-wise
loss (nor the length of its row in it) nor entropy.
Where the tokens are a part of their rows (context parallelism), `weigh` is given the counts of the whole rows. f and
the length of a row follow from them, and the loss is these tokens' share: the shares of all parts add up to it.
Saved for backward, by weigh alone: scores and indices, and f of each row with the sequence-wise loss. Activation
checkpointing keeps indices and counts (`trinity.parallel.activation_checkpoint`), 8·K bytes per token, and computes
scores and gates again, which would take 4·E. torch.compile and fake tensors see only the op's shapes.
Triton (routing_triton.py): K rounds of taking the largest score in place of topk; gates and statistics in one kernel.

Shapes: T tokens, B rows of S tokens (T = B·S), E experts, K active experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trinity_kernels.op import Op

MOST_EXPERTS = 512
"""Most experts of the Triton kernels; at 1024 they spill registers."""

TINY = 1e-20
"""Added to the sum of the chosen scores, as in transformers, so that a token whose scores are all 0 divides by no 0."""


class Weighed(NamedTuple):
    """What `weigh` returns.

    gates_TK: [T, K], the scores' dtype, differentiable.
    sequence_loss_B: [B], the scores' dtype, differentiable; None if not wanted.
    entropy_sum: scalar, the scores' dtype, in nats; no gradient.
    """

    gates_TK: Tensor
    sequence_loss_B: Tensor | None
    entropy_sum: Tensor


@torch.library.custom_op("trinity::route", mutates_args=())
def _route(scores_TE: Tensor, bias_E: Tensor, active: int, padding_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The K experts of each token, and the number of tokens per expert.

    Args:
        scores_TE: [T, E] fp32 or float64, σ(logits); no gradient flows through this op.
        bias_E: [E], the balancing bias; it affects the choice alone.
        active: K.
        padding_T: [T] bool, true for padding; None: no token is padding.
    Returns:
        indices_TK [T, K] int64, highest biased score first, −1 for padding; counts_E [E] int64, summing to K times the
        number of tokens that are not padding.
    """
    indices_TK = torch.topk(scores_TE + bias_E, active, dim=-1).indices
    chosen_TK = torch.ones_like(indices_TK)
    if padding_T is not None:
        chosen_TK.masked_fill_(padding_T.unsqueeze(1), 0)
    counts_E = torch.zeros(scores_TE.shape[-1], dtype=torch.int64, device=scores_TE.device)
    counts_E.scatter_add_(0, indices_TK.flatten(), chosen_TK.flatten())
    if padding_T is not None:
        indices_TK = indices_TK.masked_fill(padding_T.unsqueeze(1), -1)
    return indices_TK, counts_E


@_route.register_fake
def _(scores_TE: Tensor, bias_E: Tensor, active: int, padding_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    indices_TK = scores_TE.new_empty((scores_TE.shape[0], active), dtype=torch.int64)
    return indices_TK, scores_TE.new_empty((scores_TE.shape[1],), dtype=torch.int64)


def _weigh(
    scores_TE: Tensor, indices_TK: Tensor, scale: float, rows: int = 1, with_sequence_loss: bool = False,
    padded: bool = False, row_counts_BE: Tensor | None = None,
) -> Weighed:  # fmt: skip
    """Gates of the chosen experts, and statistics of the scores.

    Args:
        scores_TE: [T, E] fp32 or float64; differentiable.
        indices_TK: [T, K] int64, distinct within a token, or all −1.
        scale: the route scale.
        rows: B, the sequences that the tokens consist of, equally long and one after the other.
        with_sequence_loss: compute the sequence-wise loss; without it, gates and entropy alone.
        padded: whether tokens may be padding, with choices of −1. Their gates are 0, and they enter no statistic.
        row_counts_BE: [B, E] int64, how often each expert was chosen in the whole rows, if the tokens are a part of
            them; None: the tokens are whole rows.
    Returns:
        Weighed: the gates [T, K] (eq. 18), the sequence-wise loss of each row [B] (`sequence_loss`) or None, and the
        entropy of s/Σs summed over the tokens.
    """
    padding_TK = indices_TK < 0 if padded else None
    chosen_TK = scores_TE.gather(1, indices_TK if padding_TK is None else indices_TK.clamp_min(0))
    if padding_TK is not None:
        chosen_TK = chosen_TK.masked_fill(padding_TK, 0.0)
    gates_TK = chosen_TK / (chosen_TK.sum(dim=1, keepdim=True) + TINY) * scale
    loss_B = None
    if with_sequence_loss:
        by_row = rows, len(scores_TE) // max(rows, 1)
        rows_BSE, rows_BSK = scores_TE.unflatten(0, by_row), indices_TK.unflatten(0, by_row)
        loss_B = sequence_loss(rows_BSE, rows_BSK, padded, row_counts_BE)
    scores_TE = scores_TE.detach()
    entropy_TE = torch.special.entr(scores_TE / scores_TE.sum(dim=1, keepdim=True))
    if padding_TK is not None:
        entropy_TE.masked_fill_(padding_TK[:, :1], 0.0)
    return Weighed(gates_TK, loss_B, entropy_TE.sum())


def sequence_loss(
    scores_BSE: Tensor, indices_BSK: Tensor, padded: bool = False, row_counts_BE: Tensor | None = None
) -> Tensor:
    """Σ_i f_i·P_i of each row (eq. 29-32), in torch. trinity.balancing.sequence_loss describes it.

    Args:
        scores_BSE: [B, S, E], fp32 or float64.
        indices_BSK: [B, S, K], int64; −1 for padding.
        padded: whether tokens may be padding; a row's length is then the number of its other tokens.
        row_counts_BE: [B, E] int64, the counts of whole rows of which the tokens are a part; see `weigh`.
    Returns:
        [B], scores' dtype; 0 for rows of no tokens.
    """
    B, S, E = scores_BSE.shape
    K = indices_BSK.shape[-1]
    share_BSE = scores_BSE / scores_BSE.sum(dim=-1, keepdim=True)
    if padded:
        share_BSE = share_BSE.masked_fill(indices_BSK[..., :1] < 0, 0.0)
    if row_counts_BE is None:
        chosen_BSK = torch.ones_like(indices_BSK, dtype=scores_BSE.dtype)
        if padded:
            chosen_BSK.masked_fill_(indices_BSK < 0, 0.0)
            indices_BSK = indices_BSK.clamp_min(0)
        counts_BE = scores_BSE.new_zeros(B, E).scatter_add_(1, indices_BSK.flatten(1), chosen_BSK.flatten(1))
    else:
        counts_BE = row_counts_BE.to(scores_BSE.dtype)
    tokens: int | Tensor = max(S, 1)
    if padded or row_counts_BE is not None:
        tokens = (counts_BE.sum(dim=1, keepdim=True) / K).clamp_min(1)
    share_BE = share_BSE.sum(dim=1)
    return (counts_BE * (E / (K * tokens)) * (share_BE / tokens)).sum(dim=-1)


def _refuses(scores_TE: Tensor, *_: object, **__: object) -> str | None:
    if scores_TE.dtype != torch.float32:
        return f"it takes scores in fp32, not {scores_TE.dtype}"
    if scores_TE.shape[1] > MOST_EXPERTS:
        return f"{scores_TE.shape[1]} experts are more than the {MOST_EXPERTS} that a program holds in its registers"
    return None


route = Op(_route, "trinity_kernels.routing_triton:route", _refuses, replayed=True)
weigh = Op(_weigh, "trinity_kernels.routing_triton:weigh", _refuses)
