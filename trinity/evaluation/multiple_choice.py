"""Multiple choice and cloze from a file: the model picks the choice that it finds likeliest after the prompt.

A line of the file: {"prompt": "The sun rises in the", "choices": [" east", " west"], "answer": 0}. A choice is appended
to the prompt as it stands, so it begins with the space that belongs there.

A token may hold the end of the prompt and the beginning of a choice. So both are tokenised as one text, and all choices
of an item are scored from one place on: where the tokens of the prompt end, or where a text first has other ones.
"""

import json
import math
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from trinity.errors import UserError
from trinity.evaluation.scoring import Span, log_likelihoods
from trinity.models.trinity import Trinity
from trinity.terminal import Progress


class Item(NamedTuple):
    """One question. answer: place of the right choice, from 0."""

    prompt: str
    choices: list[str]
    answer: int


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """The items of a JSONL file, blank lines left out; only the first `limit` where given.

    Raises:
        UserError: a line that is no item, named by its number, or no item at all.
    """
    items = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # U+2028 in a text ends no line
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; give a JSONL file") from None
    for number, line in enumerate(lines, start=1):
        if line.strip() and (limit is None or len(items) < limit):
            items.append(_item(line, f"{path} line {number}"))
    if not items:
        raise UserError(f"{path} holds no items; write lines such as {_EXAMPLE}")
    return items


def choice_scores(
    model: Trinity,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    *,
    begin: list[int],
    window: int,
    batch_tokens: int = 8192,
) -> list[list[float]]:
    """ln p of each item's choices, summed over their tokens.

    Args:
        model: on any device, not sharded.
        tokenizer: the model's.
        begin: ids that a document begins with.
        window: tokens that the model sees at most; of a longer text the beginning is cut off.
        batch_tokens: tokens of one forward pass, at most.
    Raises:
        UserError: a choice that adds no token, or fills the window alone.
    """
    spans = [span for number, item in enumerate(items) for span in _spans(item, number, tokenizer, begin, window)]
    scores = [0.0] * len(spans)
    shown = Progress("choices", len(spans), "choice").over(log_likelihoods(model, spans, batch_tokens))
    for place, score in shown:
        scores[place] = score
    found = iter(scores)
    return [[next(found) for _ in item.choices] for item in items]


def accuracies(items: Sequence[Item], scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """How often the right choice is the likeliest; of equal ones the first counts.

    Returns:
        "accuracy" by summed log-likelihood, which favours short choices; "accuracy_by_byte" by log-likelihood over the
        choice's UTF-8 bytes, which does not depend on the tokenizer; the standard error of each; "items"; and "chance",
        what guessing gives.
    """
    summed, by_byte = 0, 0
    for item, row in zip(items, scores, strict=True):
        summed += _likeliest(row) == item.answer
        by_byte += _likeliest([score / len(text.encode()) for score, text in zip(row, item.choices)]) == item.answer
    n = len(items)
    figures: dict[str, float] = {}
    for name, right in (("accuracy", summed), ("accuracy_by_byte", by_byte)):
        share = right / n
        figures |= {name: share, f"{name}_error": math.sqrt(share * (1 - share) / max(n - 1, 1))}
    return figures | {"items": n, "chance": sum(1 / len(item.choices) for item in items) / n}


_EXAMPLE = '{"prompt": "The sun rises in the", "choices": [" east", " west"], "answer": 0}'


def _item(line: str, where: str) -> Item:
    try:
        value = json.loads(line)
        prompt, choices, answer = value["prompt"], value["choices"], value["answer"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where} is no item; write {_EXAMPLE}") from None
    texts = isinstance(choices, list) and all(isinstance(text, str) and text for text in choices)
    if not isinstance(prompt, str) or not texts or len(choices) < 2:
        raise UserError(f"{where} must have a text as prompt and at least two texts as choices, none empty")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError(f"{where} has answer {answer!r}; give the right choice's place, 0 to {len(choices) - 1}")
    return Item(prompt, choices, answer)


def _spans(item: Item, number: int, tokenizer: Tokenizer, begin: list[int], window: int) -> list[Span]:
    def ids_of(text: str) -> list[int]:
        return begin + tokenizer.encode(text, add_special_tokens=False).ids

    texts = [ids_of(item.prompt + choice) for choice in item.choices]
    # every text must keep a token to score, and every scored token one before it
    start = _common([ids_of(item.prompt), *(ids[:-1] for ids in texts)])
    if start < 1:
        raise UserError(f"item {number + 1} begins with what is asked for: the tokenizer has no BOS; give it a prompt")
    spans = []
    for ids in texts:
        cut = max(0, len(ids) - 1 - window)
        if cut >= start:
            raise UserError(f"item {number + 1} has a choice of over {window} tokens; raise --window or shorten it")
        spans.append(Span(ids[cut:], start - cut))
    return spans


def _common(lists: list[list[int]]) -> int:
    """How many first elements all lists share."""
    return len(list(takewhile(lambda column: len(set(column)) == 1, zip(*lists))))


def _likeliest(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)
