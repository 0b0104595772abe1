"""Log-likelihoods of given tokens, in batches of texts. Perplexity and multiple choice are both computed from them.

Rows of similar length form a batch, padded on the right: attention is causal and routing drops no token, so padding
changes nothing. The loss is computed inside the head, as in training, so that no logits are kept.

Shapes: N rows of a batch, S tokens of the longest.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.models.trinity import Trinity
from trinity_kernels.cross_entropy import IGNORE


class Span(NamedTuple):
    """A text whose tokens from index `start` on are scored, each given the tokens before it.

    tokens: ids; at least two.
    start: from 1 to len(tokens) − 1.
    """

    tokens: Sequence[int]
    start: int


def log_likelihoods(model: Trinity, spans: Sequence[Span], batch_tokens: int) -> Iterator[tuple[int, float]]:
    """Sum of ln p of the scored tokens of each span, in fp32 or the model's float64; the longest spans come first.

    Args:
        model: on any device, not sharded.
        spans: in any order.
        batch_tokens: most tokens in one forward pass, padding included; a longer span is a batch of its own.
    Yields:
        (index of the span in `spans`, its log-likelihood in nats), each index once.
    """
    for indices, ce_NS, _ in token_losses(model, spans, batch_tokens):
        yield from zip(indices, (-ce_NS.double().sum(dim=1)).tolist())


@torch.no_grad()
def token_losses(
    model: Trinity, spans: Sequence[Span], batch_tokens: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """The loss of every scored token; arguments as for log_likelihoods.

    Yields:
        For each batch: indices of its spans; ce_NS [N, S], whose entry i is the loss of token i + 1 of the span, in
        nats, 0 where it is not scored; targets_NS [N, S] int64 on the CPU, those tokens, IGNORE where not scored.
    """
    device = model.embed.weight.device
    for indices in batch_by_length([len(span.tokens) - 1 for span in spans], batch_tokens):
        longest = len(spans[indices[0]].tokens) - 1
        tokens_NS = torch.zeros((len(indices), longest), dtype=torch.int64)
        targets_NS = torch.full_like(tokens_NS, IGNORE)
        for row, index in enumerate(indices):
            ids, start = torch.as_tensor(spans[index].tokens), spans[index].start
            tokens_NS[row, : len(ids) - 1] = ids[:-1]
            targets_NS[row, start - 1 : len(ids) - 1] = ids[start:]
        yield indices, model(tokens_NS.to(device), targets_BS=targets_NS.to(device)).ce_BS, targets_NS


def batch_by_length(lengths: Iterable[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of the rows of each batch, longest first: one row, or rows · longest row at most batch_tokens."""
    batch: list[int] = []
    longest = 0
    for index, length in sorted(enumerate(lengths), key=lambda row: -row[1]):
        if batch and (len(batch) + 1) * longest > batch_tokens:
            yield batch
            batch = []
        longest = longest if batch else length
        batch.append(index)
    if batch:
        yield batch
