"""Greedy tokens equal those of transformers; the sampling distribution equals its definition, token by token.

Shapes: V vocabulary.
"""

from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from trinity.errors import UserError
from trinity.evaluation.generate import distribution, generate, stream
from trinity.models import Trinity

PROMPT = [5, 250, 17]


def test_greedy_equals_transformers(model: Trinity, exported: Path) -> None:
    """30 tokens, beyond the window of 7; transformers has a key-value cache, Trinity recomputes."""
    hf_model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    prompt = torch.tensor([PROMPT])
    expected = hf_model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=30)
    got = generate(model, PROMPT, 30, temperature=0)
    assert got == expected[0, len(PROMPT) :].tolist()
    assert len(set(got)) > 5, "one token again and again would be no test"


def test_stops_after_a_stop_token(model: Trinity) -> None:
    tokens = generate(model, PROMPT, 30, temperature=0)
    place = next(place for place in range(2, 30) if tokens[place] not in tokens[:place])
    assert generate(model, PROMPT, 30, temperature=0, stop_ids=[299, tokens[place]]) == tokens[: place + 1]
    assert generate(model, PROMPT, 0) == []


def test_seed_decides(model: Trinity) -> None:
    """Untrained, the model spreads over 300 tokens: ten equal draws with another seed do not happen."""
    first = generate(model, PROMPT, 10, seed=1)
    assert first == generate(model, PROMPT, 10, seed=1)
    assert first != generate(model, PROMPT, 10, seed=2)
    assert generate(model, PROMPT, 10, top_p=1e-6, seed=1) == generate(model, PROMPT, 10, temperature=0)


def test_tokens_come_one_by_one(model: Trinity) -> None:
    tokens = stream(model, PROMPT, 10**9, temperature=0)
    assert [next(tokens), next(tokens)] == generate(model, PROMPT, 2, temperature=0)


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
def test_distribution(temperature: float, top_p: float) -> None:
    """fp32 against float64: 1e-6 is eight units of fp32's 2⁻²³; a token more or less is far outside it."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(4)) * 3
    got = distribution(logits, temperature, top_p)
    assert (got - nucleus(logits.tolist(), temperature, top_p)).abs().max() < 1e-6
    assert ((got > 0) == (nucleus(logits.tolist(), temperature, top_p) > 0)).all()


def test_draws_follow_the_distribution(model: Trinity) -> None:
    """First tokens of 200 seeds, χ² over ten groups: above 33.7 once in 10,000 correct programs."""
    with torch.no_grad():
        probabilities = distribution(model(torch.tensor([PROMPT]))[0, -1], 0.7, 1.0)
    groups = (probabilities.cumsum(0) * 10).long().clamp(max=9)
    expected = torch.zeros(10).index_add(0, groups, probabilities) * 200
    drawn = torch.tensor([generate(model, PROMPT, 1, temperature=0.7, seed=seed)[0] for seed in range(200)])
    counts = groups[drawn].bincount(minlength=10)
    assert ((counts - expected).square() / expected).sum() < 33.7


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"token_ids": []}, "no token to continue"),
        ({"temperature": -0.1}, r"temperature=-0\.1 is negative"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, r"top_p=0\.0 is not"),
        ({"top_p": 1.5}, r"top_p=1\.5 is not"),
    ],
)
def test_invalid_settings(model: Trinity, changes: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        generate(**{"model": model, "token_ids": PROMPT, "max_new_tokens": 1} | changes)
