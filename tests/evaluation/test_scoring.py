"""Scores of padded batches equal those of each text alone, computed token by token from its logits, in float64."""

import pytest
import torch

from trinity.evaluation.scoring import Span, batch_by_length, log_likelihoods
from trinity.models import Trinity

LENGTHS = [(2, 1), (9, 1), (9, 8), (30, 12), (5, 3), (17, 1), (30, 29)]


def plain_log_likelihood(model: Trinity, span: Span) -> float:
    """Σ ln p of the span's scored tokens, by softmax over all logits."""
    with torch.no_grad():
        logs_SV = torch.log_softmax(model(torch.tensor([span.tokens]))[0], dim=-1)
    return sum(logs_SV[place - 1, span.tokens[place]].item() for place in range(span.start, len(span.tokens)))


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_scores_equal_those_of_each_text_alone(exact: Trinity, batch_tokens: int) -> None:
    """1e-10: float64 has 2⁻⁵², over some dozens of sums of numbers below 10. Lengths exceed the attention window."""
    generator = torch.Generator().manual_seed(5)
    spans = [Span(torch.randint(400, (n,), generator=generator).tolist(), start) for n, start in LENGTHS]
    scores = dict(log_likelihoods(exact, spans, batch_tokens))
    assert sorted(scores) == list(range(len(spans)))
    for place, span in enumerate(spans):
        assert abs(scores[place] - plain_log_likelihood(exact, span)) < 1e-10, span


def test_batch_by_length() -> None:
    lengths = [3, 50, 7, 7, 1, 20]
    batches = list(batch_by_length(lengths, 21))
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    assert batches == [[1], [5], [2, 3, 0], [4]]
    assert list(batch_by_length([], 21)) == []
