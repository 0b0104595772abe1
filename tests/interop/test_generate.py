"""Greedy tokens equal those of transformers; a row's text does not depend on the other rows.

Shapes: V vocabulary.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from trinity.config.model import ZOO
from trinity.errors import UserError
from trinity.evaluation.generate import Generation, generate, generate_batch, stream
from trinity.evaluation.sampling import Sampling, distribution
from trinity.interop import export_hf
from trinity.models import Trinity

PROMPT = [5, 250, 17]
PROMPTS = [PROMPT, [9], [200, 7, 7, 31, 4, 88, 150, 2, 60, 11]]
GREEDY = Sampling(temperature=0)


def transformers_greedy(folder: Path, prompts: list[list[int]], new_tokens: int, **options: object) -> list[list[int]]:
    """Its new tokens of each prompt, with its cache and prompts padded on the left; it does not stop."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    seen = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options |= {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 0}
    return hf_model.generate(tokens, attention_mask=seen, **options)[:, longest:].tolist()


def test_greedy_equals_transformers(model: Trinity, exported: Path) -> None:
    """30 tokens, beyond the window of 7, from one prompt and from three of different length."""
    [expected] = transformers_greedy(exported, [PROMPT], 30)
    assert generate(model, PROMPT, 30, temperature=0) == expected
    assert len(set(expected)) > 5, "one token again and again would be no test"
    assert generate_batch(model, PROMPTS, 30, GREEDY) == transformers_greedy(exported, PROMPTS, 30)


def test_repetition_penalty_equals_transformers(model: Trinity, exported: Path) -> None:
    [expected] = transformers_greedy(exported, [PROMPT], 30, repetition_penalty=1.2)
    assert generate_batch(model, [PROMPT], 30, Sampling(temperature=0, repetition_penalty=1.2)) == [expected]
    assert expected != generate(model, PROMPT, 30, temperature=0)


def test_the_smoke_model_equals_transformers(tmp_path: Path) -> None:
    """Exported in fp32; prompts that end before and behind its window of 128, and 24 tokens that cross it."""
    model = Trinity(ZOO["smoke"])
    folder = export_hf(model, tmp_path / "smoke", dtype=torch.float32)
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(8192, (length,), generator=random).tolist() for length in (115, 140)]
    expected = transformers_greedy(folder, prompts, 24)
    assert generate_batch(model, prompts, 24, GREEDY) == expected
    assert len({token for row in expected for token in row}) > 10


def test_rows_are_independent(model: Trinity) -> None:
    """In float64, so that rounding decides nothing: sampled together and alone, in chunks of 4 and at once; one row
    stops early."""
    model.double()
    sampling, seeds = Sampling(temperature=1.3, top_k=40), [3, 3, 8]
    alone = [generate_batch(model, [prompt], 20, sampling, [seed])[0] for prompt, seed in zip(PROMPTS, seeds)]
    assert generate_batch(model, PROMPTS, 20, sampling, seeds) == alone
    stop = alone[1][4]
    ends = [row.index(stop) + 1 if stop in row else 20 for row in alone]
    texts: list[list[int]] = [[], [], []]
    for row, token in Generation(model, PROMPTS, 20, sampling, seeds, [stop], chunk=4):
        texts[row].append(token)
    assert texts == [row[:end] for row, end in zip(alone, ends)]
    assert ends[1] <= 5


def test_a_row_can_be_finished(model: Trinity) -> None:
    """From outside, after its third token; the others go on."""
    expected = generate_batch(model, PROMPTS, 12, GREEDY)
    generation, texts = Generation(model, PROMPTS, 12, GREEDY), [[], [], []]
    for row, token in generation:
        texts[row].append(token)
        if row == 0 and len(texts[0]) == 3:
            generation.finish(0)
    assert texts == [expected[0][:3], *expected[1:]]
    assert generation.texts == [prompt + text for prompt, text in zip(PROMPTS, texts)]


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
    ("changes", "sentence"), [({"token_ids": []}, "no token to continue"), ({"temperature": -0.1}, "is negative")]
)
def test_invalid_settings(model: Trinity, changes: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        generate(**{"model": model, "token_ids": PROMPT, "max_new_tokens": 1} | changes)
