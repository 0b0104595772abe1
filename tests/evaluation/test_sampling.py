"""Distributions equal those of transformers' processors and of the definitions in float64.

Shapes: V vocabulary.
"""

from itertools import accumulate

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trinity.errors import UserError
from trinity.evaluation.sampling import Sampling, choose, distribution, penalize


def random_logits(size: int = 50) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(4)) * 3


def nucleus(logits: list[float], temperature: float, top_p: float) -> Tensor:
    """Holtzman et al.'s definition in float64: likeliest first, until their probability reaches top_p."""
    weights = torch.tensor(logits, dtype=torch.float64).div(temperature).exp()
    probabilities = (weights / weights.sum()).tolist()
    ranked = sorted(range(len(logits)), key=lambda token: -probabilities[token])
    reached = accumulate(probabilities[token] for token in ranked)
    counts = (count for count, total in enumerate(reached, start=1) if total >= top_p)
    count = next(counts) if top_p < 1 else len(ranked)
    kept = [p if token in ranked[:count] else 0.0 for token, p in enumerate(probabilities)]
    return torch.tensor(kept, dtype=torch.float64) / sum(kept)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.2, 0.5, 0.9, 0.999, 1.0])
def test_nucleus(temperature: float, top_p: float) -> None:
    """fp32 against float64: 1e-6 is eight units of fp32's 2⁻²³; a token more or less is far outside it."""
    logits = random_logits()
    got = distribution(logits, temperature, top_p)
    assert (got - nucleus(logits.tolist(), temperature, top_p)).abs().max() < 1e-6
    assert ((got > 0) == (nucleus(logits.tolist(), temperature, top_p) > 0)).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("top_p", [0.7, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 50, 60])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_equals_transformers(temperature: float, top_p: float, top_k: int, min_p: float) -> None:
    """All limits together, in its order; two roundings of probabilities, 1e-6."""
    logits = random_logits()
    limits = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    limits += [TopKLogitsWarper(top_k)] if top_k else []
    limits += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    limits += [MinPLogitsWarper(min_p)] if min_p else []
    expected = LogitsProcessorList(limits)(torch.zeros(1, 1, dtype=torch.int64), logits[None])[0].softmax(dim=-1)
    got = distribution(logits, temperature, top_p, top_k, min_p)
    assert ((got > 0) == (expected > 0)).all()
    assert (got - expected).abs().max() < 1e-6


def test_repetition_penalty_equals_transformers() -> None:
    """Tokens that a row has once or twice, with logits of both signs; the other row's tokens stay."""
    logits, texts = random_logits(100).view(2, 50), [[3, 3, 7], [0, 1, 49]]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(texts), logits.clone())
    assert (logits < 0)[0, 7] != (logits < 0)[0, 3] or (logits < 0)[1, [0, 1, 49]].unique().numel() == 2
    assert torch.equal(penalize(logits, texts, 1.7), expected)


def test_greedy_tie_goes_to_the_smaller_id() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    assert choose(logits, Sampling(temperature=0), [[0]], [torch.Generator()]) == [1]


def test_draws_follow_the_distribution() -> None:
    """10,000 draws, χ² over ten tokens: above 33.7 once in 10,000 correct programs."""
    probabilities = distribution(random_logits(10), 2.0)
    generator = torch.Generator().manual_seed(0)
    rows = random_logits(10).expand(10_000, 10)
    drawn = choose(rows, Sampling(temperature=2.0), [[]] * 10_000, [generator] * 10_000)
    counts, expected = torch.tensor(drawn).bincount(minlength=10), probabilities * 10_000
    assert ((counts - expected).square() / expected).sum() < 33.7


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"temperature": -0.1}, r"temperature=-0\.1 is negative"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, r"top_p=0\.0 is not"),
        ({"top_p": 1.5}, r"top_p=1\.5 is not"),
        ({"top_k": -1}, "top_k=-1 is negative"),
        ({"min_p": 1.1}, r"min_p=1\.1 is not"),
        ({"min_p": float("nan")}, "min_p=nan is not"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0\.0 must be above 0"),
    ],
)
def test_invalid_values(changes: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Sampling(**changes)
