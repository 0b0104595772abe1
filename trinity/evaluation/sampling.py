"""Choose the next token from logits: greedy, or sampled at a temperature from the likeliest tokens.

The limits apply one after the other, as in transformers: repetition penalty, temperature, top-k, top-p, min-p.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trinity.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    Raises:
        UserError: a value is out of range.
    """

    temperature: float = 1.0
    """Divides the logits; 0: greedy decoding."""
    top_p: float = 1.0
    """Nucleus sampling: keep the likeliest tokens that together have this probability (arXiv 1904.09751)."""
    top_k: int = 0
    """Keep this number of likeliest tokens; 0: all."""
    min_p: float = 0.0
    """Keep the tokens with at least this share of the likeliest token's probability (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Divide the positive logits of tokens that the text has, and multiply their negative ones (arXiv 1909.05858)."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature={self.temperature} is negative; write 0 for the likeliest token, or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} is not a probability above 0; write 1 to allow every token")
        if not self.top_k >= 0:
            raise UserError(f"top_k={self.top_k} is negative; write 0 to allow every token")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p={self.min_p} is not between 0 and 1; write 0 to allow every token")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"repetition_penalty={self.repetition_penalty} must be above 0; write 1 for no penalty")


PLAIN = Sampling()
"""From the model's own distribution."""


def choose(
    logits_BV: Tensor, sampling: Sampling, texts: Sequence[Sequence[int]], generators: Sequence[torch.Generator]
) -> list[int]:
    """The next token of each row; a greedy tie goes to the smaller id.

    Args:
        logits_BV: [B, V], floating point.
        texts: the tokens of each row so far.
        generators: of each row, on the logits' device; without draws at temperature 0.
    """
    if sampling.repetition_penalty != 1:
        logits_BV = penalize(logits_BV, texts, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1).tolist()
    chosen = [
        torch.multinomial(
            distribution(logits_V.float(), sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p),
            1,
            generator=generator,
        )
        for logits_V, generator in zip(logits_BV, generators)
    ]
    return torch.cat(chosen).tolist()


def penalize(logits_BV: Tensor, texts: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Make the tokens of each row's text less likely, or with a penalty below 1 more likely; a new tensor."""
    logits_BV = logits_BV.clone()
    for logits_V, text in zip(logits_BV, texts):
        seen = torch.tensor(sorted(set(text)), device=logits_V.device)
        logits = logits_V[seen]
        logits_V[seen] = torch.where(logits > 0, logits / penalty, logits * penalty)
    return logits_BV


def distribution(
    logits_V: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> Tensor:
    """Probabilities of the next token.

    Args:
        logits_V: [V] fp32.
        temperature: greater than 0.
        top_p: the smallest set of likeliest tokens whose total probability reaches it is kept; the others get 0.
        top_k: tokens less likely than the k-th are dropped before top_p; 0: none.
        min_p: tokens below this share of the largest probability are dropped.
    Returns:
        [V] fp32, summing to 1.
    """
    logits_V = logits_V / temperature
    if 0 < top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(top_k).values[-1], -torch.inf)
    probabilities_V = torch.softmax(logits_V, dim=-1)
    if top_p < 1:  # rounding of the sum below could drop the least likely tokens
        ranked_V, order_V = probabilities_V.sort(descending=True, stable=True)
        before_V = ranked_V.cumsum(dim=-1) - ranked_V  # 0 for the likeliest token, so that it is always kept
        kept_V = ranked_V.where(before_V < top_p, 0)
        probabilities_V = torch.zeros_like(probabilities_V).scatter(0, order_V, kept_V / kept_V.sum())
    if min_p > 0:
        kept_V = probabilities_V.where(probabilities_V >= min_p * probabilities_V.max(), 0)
        probabilities_V = kept_V / kept_V.sum()
    return probabilities_V
