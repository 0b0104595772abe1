"""Forced decoding equals greedy decoding; a model that copies scores 1, one that cannot 0.

Shapes: B rows, S tokens, N chosen tokens, V vocabulary.
"""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from trinity.data.tokenizer.tokenizer import load_text_encoder
from trinity.evaluation import needle_score
from trinity.evaluation.generate import generate
from trinity.evaluation.needle import KINDS, STRATA, Haystack, NeedleSample, NeedleTask
from trinity.evaluation.needle_score import Cell, Outcome, contains, forced, forced_cell, greedy, share
from trinity.models import ModelConfig, Trinity
from trinity_kernels.cross_entropy import IGNORE

CPU = torch.device("cpu")
LENGTH = 300
SMALL = ModelConfig(
    vocab_size=512, width=32, layers=2, dense_layers=2, dense_width=64, heads=2, kv_heads=1, head_dim=16, window=16,
    global_every=2,
)  # fmt: skip


def samples(corpus: SimpleNamespace, count: int, kind: int = 2, length: int = LENGTH) -> list[NeedleSample]:
    task = NeedleTask(corpus.tokenizer, 512, kind, length, Haystack("Some words are here. " * 20, "words"))
    return [task.sample(index) for index in range(count)]


@pytest.fixture(scope="module")
def trained(corpus: SimpleNamespace) -> Trinity:
    """A model that has learned the answers to the first four of eight samples by heart, in float64."""
    model, learned = Trinity(SMALL).double(), samples(corpus, 8)[:4]
    rows = [torch.tensor([*sample.tokens, *sample.answer]) for sample in learned]
    tokens_BS = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    targets_BS = torch.full_like(tokens_BS, IGNORE)
    for targets_S, sample in zip(targets_BS, learned):
        begin = len(sample.tokens)
        targets_S[begin - 1 : begin - 1 + len(sample.answer)] = torch.tensor(sample.answer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model.loss(tokens_BS, targets_BS)
        if loss < 0.05:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_forced_equals_greedy(corpus: SimpleNamespace, trained: Trinity) -> None:
    """On samples that a trained toy answers and on others: right if and only if greedy decoding begins with the answer.

    float64, so that no near-tie differs between one row and a padded batch. The nats are those of all logits: 1e-9.
    """
    asked = samples(corpus, 8)
    outcomes = forced(trained, asked, LENGTH, CPU)
    begins = []
    for sample, outcome in zip(asked, outcomes):
        new = generate(trained, sample.tokens, len(sample.answer), temperature=0)
        begins.append(new == sample.answer)
        with torch.no_grad():
            logs_SV = trained(torch.tensor([[*sample.tokens, *sample.answer]]))[0].log_softmax(dim=-1)
        places = range(len(sample.tokens) - 1, len(sample.tokens) - 1 + len(sample.answer))
        nats = -sum(logs_SV[place, token].item() for place, token in zip(places, sample.answer))
        assert outcome.nats == pytest.approx(nats, abs=1e-9)
    assert [outcome.right for outcome in outcomes] == begins
    assert begins == [True] * 4 + [False] * 4, "both outcomes"
    tok = load_text_encoder(corpus.tokenizer)
    for sample, outcome in zip(asked[:2], outcomes):
        by_text = greedy(trained, sample, tok)
        assert by_text.begins == outcome.right
        assert by_text.substring >= by_text.begins


class Copier(torch.nn.Module):
    """A scripted model: reads the text so far, and says what comes next if the question is answered from the needles.

    Args:
        wrong: answer with the value reversed.
    """

    def __init__(self, tokenizer: Tokenizer, wrong: bool = False) -> None:
        super().__init__()
        self.tokenizer, self.wrong = tokenizer, wrong

    def generate(self, _: object, tokens: list[int], new: int, **options: object) -> list[int]:
        """Greedy decoding, in place of trinity.evaluation.generate.generate."""
        text = list(tokens)
        for _ in range(new):
            text.append(self.after(text))
        return text[len(tokens) :]

    def forward(self, tokens_BS: Tensor, logits_to_keep: Tensor) -> Tensor:
        logits_BNV = torch.zeros(*logits_to_keep.shape, 512)
        for tokens_S, at_N, logits_NV in zip(tokens_BS.tolist(), logits_to_keep.tolist(), logits_BNV):
            for place, logits_V in zip(at_N, logits_NV):
                logits_V[self.after(tokens_S[: place + 1])] = 10.0
        return logits_BNV

    def after(self, tokens: list[int]) -> int:
        text = self.tokenizer.decode(tokens)
        question = re.search(r"The special magic \w+ for (\S+) mentioned in the provided text is", text)
        found = question and re.search(rf"magic \w+ for {question[1]} is: (\S+?)\.", text)
        if not found:
            return 0
        value = found[1][::-1] if self.wrong else found[1]
        whole = self.tokenizer.encode(f"{text[: question.end()]} {value}. {'and ' * 30}", add_special_tokens=False).ids
        done = len(self.tokenizer.encode(text, add_special_tokens=False).ids)
        return whole[done]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_copies(corpus: SimpleNamespace, kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It scores 1, by both scorings; 0 without the needle, and 0 if it reverses the value."""
    tok = load_text_encoder(corpus.tokenizer)
    asked = samples(corpus, 3, kind, 600)
    model = Copier(tok)
    assert [outcome.right for outcome in forced(model, asked, 600, CPU)] == [True] * 3
    monkeypatch.setattr(needle_score, "generate", model.generate)
    assert greedy(model, asked[0], tok) == Outcome(True, pytest.approx(math.nan, nan_ok=True), True, True)
    without = [s._replace(tokens=s.tokens[: s.needle[0]] + s.tokens[s.needle[1] :]) for s in asked]
    assert [outcome.right for outcome in forced(model, without, 600, CPU)] == [False] * 3
    wrong = Copier(tok, wrong=True)
    assert [outcome.right for outcome in forced(wrong, asked, 600, CPU)] == [False] * 3
    monkeypatch.setattr(needle_score, "generate", wrong.generate)
    assert not greedy(wrong, asked[0], tok).right


@pytest.mark.parametrize(
    ("text", "value", "right", "substring"),
    [
        (" 1234567.", "1234567", True, True),
        ("1234567", "1234567", True, True),
        (": 1234567 and", "1234567", True, True),
        (" 12345678.", "1234567", False, True),
        (" 91234567.", "1234567", False, True),
        (" 1,234,567.", "1234567", False, False),
        (" AB12-CD.", "ab12-cd", True, True),
        (" ab12-cde", "ab12-cd", False, True),
    ],
)
def test_contains(text: str, value: str, right: bool, substring: bool) -> None:
    """A value within a longer number is not found, though RULER's substring is."""
    assert contains(text, value) == right
    assert (value in text.lower()) == substring


def test_cell() -> None:
    """Against the definitions: 7 right of 12, the strata 0 and 1 with two samples each."""
    right = [1, 0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 1]
    cell = Cell.of([Outcome(bool(x), float(index), bool(x), True) for index, x in enumerate(right)])
    assert cell.samples == 12
    assert cell.score == cell.begins == pytest.approx(7 / 12)
    assert cell.error == pytest.approx(math.sqrt(7 / 12 * 5 / 12 / 12))
    assert (cell.nats, cell.substring) == (5.5, 1.0)
    assert cell.by_depth == [0.5, 0.5, *right[2:10]]
    assert math.isnan(Cell.of([Outcome(True, 0.0, True, True)]).by_depth[STRATA - 1])


def test_shares() -> None:
    """Every sample is scored, by equally many forward passes on each rank, also with more ranks than samples."""
    for count in (1, 7, 50):
        for ranks in (1, 2, 7, 60):
            shares = [share(count, rank, ranks) for rank in range(ranks)]
            assert {number for numbers in shares for number in numbers} == set(range(count))
            assert {len(numbers) for numbers in shares} == {-(-count // ranks)}
            assert {len(set(numbers)) for numbers in shares} == {-(-count // ranks)}


def test_forced_cell(corpus: SimpleNamespace, trained: Trinity) -> None:
    """In batches of three, with a beat each: the outcomes of `forced` on all samples at once, to rounding (1e-9)."""
    asked, beats = samples(corpus, 8), []
    cell = forced_cell(trained, dict(enumerate(asked)), 8, 3, LENGTH, CPU, lambda: beats.append(1))
    expected = Cell.of(forced(trained, asked, LENGTH, CPU))
    assert cell._replace(nats=0, by_depth=[]) == expected._replace(nats=0, by_depth=[])
    assert cell.nats == pytest.approx(expected.nats, abs=1e-9)
    assert cell.by_depth[:8] == [1.0] * 4 + [0.0] * 4
    assert len(beats) == 3


def test_chosen_logits_are_those_of_all(exact: Trinity) -> None:
    """logits_to_keep, in float64: 1e-12."""
    tokens_BS = torch.randint(400, (2, 30), generator=torch.Generator().manual_seed(1))
    at_BN = torch.tensor([[0, 7, 29], [4, 4, 12]])
    with torch.no_grad():
        chosen_BNV, all_BSV = exact(tokens_BS, logits_to_keep=at_BN), exact(tokens_BS)
    expected_BNV = torch.stack([row_SV[at_N] for row_SV, at_N in zip(all_BSV, at_BN)])
    torch.testing.assert_close(chosen_BNV, expected_BNV, rtol=0, atol=1e-12)
