"""Log-likelihoods of given tokens, many texts at once: what perplexity and multiple choice are both made of.

Rows of similar length go together, padded on the right: attention looks only to the left and routing drops no token,
so padding changes nothing. The loss is taken where training takes it, inside the head, so that no logits are kept.

Shapes: N rows of a batch, S tokens of the longest.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from trinity.models.trinity import Trinity
from trinity_kernels.cross_entropy import IGNORE


class Span(NamedTuple):
    """Tokens, of which those from `start` on are scored, each by what stands before it.

    tokens: ids; at least two.
    start: from 1 to len(tokens) − 1.
    """

    tokens: Sequence[int]
    start: int


@torch.no_grad()
def log_likelihoods(model: Trinity, spans: Sequence[Span], batch_tokens: int) -> Iterator[tuple[int, float]]:
    """ln p of the scored tokens of each span, summed, in fp32 or the model's float64; the longest spans come first.

    Args:
        model: on any device, not sharded.
        spans: in any order.
        batch_tokens: padded tokens of one forward pass, at most; a longer span goes alone.
    Yields:
        (the span's place in `spans`, its log-likelihood in nats), each place once.
    """
    device = model.embed.weight.device
    for places in batches([len(span.tokens) - 1 for span in spans], batch_tokens):
        longest = len(spans[places[0]].tokens) - 1
        tokens_NS = torch.zeros((len(places), longest), dtype=torch.int64)
        targets_NS = torch.full_like(tokens_NS, IGNORE)
        for row, place in enumerate(places):
            ids, start = torch.as_tensor(spans[place].tokens), spans[place].start
            tokens_NS[row, : len(ids) - 1] = ids[:-1]
            targets_NS[row, start - 1 : len(ids) - 1] = ids[start:]
        ce_NS = model(tokens_NS.to(device), targets_BS=targets_NS.to(device)).ce_BS
        yield from zip(places, (-ce_NS.double().sum(dim=1)).tolist())


def batches(lengths: Iterable[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places of rows that go together, longest first; rows times the longest are at most batch_tokens, or one row."""
    batch: list[int] = []
    longest = 0
    for length, place in sorted(((length, place) for place, length in enumerate(lengths)), key=lambda it: -it[0]):
        if batch and (len(batch) + 1) * longest > batch_tokens:
            yield batch
            batch = []
        longest = longest if batch else length
        batch.append(place)
    if batch:
        yield batch
