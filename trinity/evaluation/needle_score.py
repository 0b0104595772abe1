"""Score the answers to needle questions: by forced decoding, in one forward pass, or by greedy decoding.

forced   The answer is right if each of its tokens has the largest logit, given the prompt and the answer's tokens
         before it. By induction over the tokens: greedy decoding begins with exactly the answer's tokens.
greedy   The text of greedy decoding contains the value, not as a part of a longer number or UUID. This also counts an
         answer with other words before it, so it is at least the forced score. RULER's own score accepts the value as
         part of a longer number as well; it is reported beside it.

Needles inside a run are scored by forced decoding, on any mesh: each data rank takes every R-th sample, every rank
makes the same number of forward passes, and the head computes logits at the answer's tokens alone.

Shapes: B rows of a forward pass, S tokens, A tokens of the longest answer, V vocabulary, N samples of a cell.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer

from trinity.evaluation.generate import generate
from trinity.evaluation.needle import SPARE, STRATA, NeedleSample
from trinity.models.trinity import Trinity


class Outcome(NamedTuple):
    """The score of one sample.

    right: whether the answer is right.
    nats: −ln of the probability of the answer's tokens; NaN after greedy decoding, which does not compute it.
    begins: whether the continuation begins with exactly the answer's tokens; equals `right` in forced decoding.
    substring: RULER's score: the continuation contains the value, in any place.
    """

    right: bool
    nats: float
    begins: bool
    substring: bool


@torch.no_grad()
def forced(model: Trinity, samples: Sequence[NeedleSample], length: int, device: torch.device) -> list[Outcome]:
    """Score samples by forced decoding, in one forward pass of rows of `length` tokens.

    Padding stands to the right: attention is causal and routing drops no token, so it changes nothing.

    Args:
        model: sharded or not; a sharded one must be called by every rank.
        samples: at least one, of at most `length` tokens with their answers.
    """
    longest = max(len(sample.answer) for sample in samples)
    tokens_BS = torch.zeros((len(samples), length), dtype=torch.int64)
    at_BA, answers_BA = (torch.zeros((len(samples), longest), dtype=torch.int64) for _ in range(2))
    for row, (prompt, answer, *_) in enumerate(samples):
        tokens_BS[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        at_BA[row, : len(answer)] = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
        answers_BA[row, : len(answer)] = torch.tensor(answer)
    logits_BAV = model(tokens_BS.to(device), logits_to_keep=at_BA.to(device)).cpu()
    logits_BAV = logits_BAV if logits_BAV.dtype == torch.float64 else logits_BAV.float()
    outcomes = []
    for logits_AV, answers_A, sample in zip(logits_BAV, answers_BA, samples):
        logits_AV, answers_A = logits_AV[: len(sample.answer)], answers_A[: len(sample.answer)]
        right = torch.equal(logits_AV.argmax(dim=-1), answers_A)
        nats = F.cross_entropy(logits_AV, answers_A, reduction="sum").item()
        outcomes.append(Outcome(right, nats, right, right))
    return outcomes


def greedy(model: Trinity, sample: NeedleSample, tokenizer: Tokenizer, stop_ids: Sequence[int] = ()) -> Outcome:
    """Score one sample by greedy decoding of the answer's length and SPARE more tokens.

    Args:
        model: not sharded.
        stop_ids: tokens that end the text.
    """
    new = generate(model, sample.tokens, len(sample.answer) + SPARE, temperature=0, stop_ids=stop_ids)
    begins = new[: len(sample.answer)] == sample.answer
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Outcome(contains(text, sample.value), math.nan, begins, sample.value.lower() in text.lower())


def contains(text: str, value: str) -> bool:
    """Whether a text contains a value, in any case, with no further digit at either side; for a UUID, no further
    hexadecimal digit or hyphen."""
    part = r"\d" if value.isdecimal() else "[0-9a-f-]"
    return re.search(rf"(?<!{part}){re.escape(value)}(?!{part})", text, re.IGNORECASE) is not None


class Cell(NamedTuple):
    """The scores of one kind at one length.

    score: share of right answers, and its binomial standard error. nats: mean over the samples.
    begins, substring: shares, see Outcome.
    by_depth: STRATA scores, by the depth of the asked needle; NaN for a stratum without samples.
    """

    samples: int
    score: float
    error: float
    nats: float
    begins: float
    substring: float
    by_depth: list[float]

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> "Cell":
        """Of the outcomes of samples 0, 1, 2, … in this order."""
        right, nats, begins, substring = (list(column) for column in zip(*outcomes))
        score = sum(right) / len(right)
        return cls(
            len(right),
            score,
            math.sqrt(score * (1 - score) / len(right)),
            math.fsum(nats) / len(nats),
            sum(begins) / len(begins),
            sum(substring) / len(substring),
            [_mean(right[stratum::STRATA]) for stratum in range(STRATA)],
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def share(count: int, data_rank: int, data_ranks: int) -> list[int]:
    """Numbers of the samples that a data rank scores: as many on every rank, so that some may be scored twice."""
    return [(data_rank + turn * data_ranks) % count for turn in range(-(-count // data_ranks))]


def forced_cell(
    model: Trinity,
    samples: dict[int, NeedleSample],
    count: int,
    rows: int,
    length: int,
    device: torch.device,
    beat: Callable[[], None] | None = None,
) -> Cell:
    """Score a cell by forced decoding, on all ranks together; the result is the same on each, on any mesh.

    Args:
        model: sharded or not.
        samples: number → sample of those that this rank scores, from `share`; equally many on every rank.
        count: N, samples of the cell over all ranks.
        rows: most rows of a forward pass.
        length: tokens of a row.
        beat: called after each forward pass.
    """
    results_N2 = torch.full((count, 2), -math.inf, dtype=torch.float64)
    numbers = list(samples)
    for start in range(0, len(numbers), rows):
        batch = numbers[start : start + rows]
        outcomes = forced(model, [samples[number] for number in batch], length, device)
        for number, outcome in zip(batch, outcomes):
            results_N2[number] = torch.tensor([outcome.right, outcome.nats], dtype=torch.float64)
        if beat is not None:
            beat()
    if dist.is_initialized():
        dist.all_reduce(results_N2, op=dist.ReduceOp.MAX)  # ranks that scored the same sample have the same result
    return Cell.of([Outcome(bool(right), nats, bool(right), bool(right)) for right, nats in results_N2.tolist()])
