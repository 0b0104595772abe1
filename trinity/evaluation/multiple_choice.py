"""Multiple choice and cloze from a JSONL file: the model's answer is the likeliest choice after the prompt.

A line of the file: {"prompt": "The sun rises in the", "choices": [" east", " west"], "answer": 0}. A choice is appended
to the prompt unchanged, so it begins with a space where the text needs one.

A token may span the end of the prompt and the beginning of a choice. So prompt and choice are tokenised as one text,
and all choices of an item are scored from the same position: the end of the token prefix that they share with the
prompt.
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
    """One question. answer: index of the right choice, from 0."""

    prompt: str
    choices: list[str]
    answer: int


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """The items of a JSONL file without its blank lines; at most the first `limit`.

    Raises:
        UserError: a line is not an item (naming its number), or the file has no items.
    """
    items: list[Item] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: U+2028 may be in a text
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
        begin: token ids at the beginning of a document, such as BOS.
        window: most tokens of context; the beginning of a longer text is cut off.
        batch_tokens: most tokens in one forward pass.
    Raises:
        UserError: an item without a token before its choices, or a choice longer than the window.
    """
    spans = [span for number, item in enumerate(items) for span in _spans(item, number, tokenizer, begin, window)]
    scores = [0.0] * len(spans)
    scored = Progress("choices", len(spans), "choice").over(log_likelihoods(model, spans, batch_tokens))
    for index, score in scored:
        scores[index] = score
    remaining = iter(scores)
    return [[next(remaining) for _ in item.choices] for item in items]


def accuracies(items: Sequence[Item], scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """Share of the items whose right choice is the likeliest; of equally likely choices, the first.

    Returns:
        "accuracy" by summed log-likelihood, which favours short choices; "accuracy_by_byte" by log-likelihood per UTF-8
        byte of the choice, which does not depend on the tokenizer; "…_error", the standard error of each; "items", the
        number of items; and "chance", the expected accuracy of guessing.
    """
    summed, by_byte = 0, 0
    for item, row in zip(items, scores, strict=True):
        summed += _likeliest(row) == item.answer
        by_byte += _likeliest([score / len(text.encode()) for score, text in zip(row, item.choices)]) == item.answer
    n = len(items)
    figures: dict[str, float] = {}
    for name, correct in (("accuracy", summed), ("accuracy_by_byte", by_byte)):
        share = correct / n
        figures |= {name: share, f"{name}_error": math.sqrt(share * (1 - share) / max(n - 1, 1))}
    return figures | {"items": n, "chance": sum(1 / len(item.choices) for item in items) / n}


_EXAMPLE = '{"prompt": "The sun rises in the", "choices": [" east", " west"], "answer": 0}'


def _item(line: str, where: str) -> Item:
    try:
        value = json.loads(line)
        prompt, choices, answer = value["prompt"], value["choices"], value["answer"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where} is not an item; write {_EXAMPLE}") from None
    texts = isinstance(choices, list) and all(isinstance(text, str) and text for text in choices)
    if not isinstance(prompt, str) or not texts or len(choices) < 2:
        raise UserError(f"{where} must have a text as prompt and at least two texts as choices, none empty")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError(f"{where} has answer {answer!r}; give the index of the right choice, 0 to {len(choices) - 1}")
    return Item(prompt, choices, answer)


def _spans(item: Item, number: int, tokenizer: Tokenizer, begin: list[int], window: int) -> list[Span]:
    def ids_of(text: str) -> list[int]:
        return begin + tokenizer.encode(text, add_special_tokens=False).ids

    texts = [ids_of(item.prompt + choice) for choice in item.choices]
    # every text needs a token to score, and every scored token one before it
    start = _common_prefix_length([ids_of(item.prompt), *(ids[:-1] for ids in texts)])
    if start < 1:
        raise UserError(
            f"item {number + 1} has no token before its choices; give it a prompt, or use a tokenizer with BOS"
        )
    spans = []
    for ids in texts:
        cut = max(0, len(ids) - 1 - window)
        if cut >= start:
            raise UserError(f"item {number + 1} has a choice of over {window} tokens; raise --window or shorten it")
        spans.append(Span(ids[cut:], start - cut))
    return spans


def _common_prefix_length(lists: list[list[int]]) -> int:
    return len(list(takewhile(lambda column: len(set(column)) == 1, zip(*lists))))


def _likeliest(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)
