"""A task of associative recall: find the value of a key among pairs hidden in noise.

    noise … [pair, key, value] … noise … [pair, key, value] … noise [question, key, value] [question, key, value] …

Token ids: PAIR, QUESTION, 32 keys, 16 values, 78 noise tokens. The keys of a row are distinct, its values need not be.

Shapes: B rows, S tokens of a row.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trinity.data.stream.collate import Batch
from trinity_kernels.cross_entropy import IGNORE

PAIR, QUESTION, FIRST_KEY = 0, 1, 2
KEYS, VALUES, NOISE = 32, 16, 78
FIRST_VALUE = FIRST_KEY + KEYS
FIRST_NOISE = FIRST_VALUE + VALUES
VOCABULARY = FIRST_NOISE + NOISE
WIDTH = 3
"""Tokens of a pair, and of a question with its answer."""


class Questions(NamedTuple):
    """Rows that end with one question.

    tokens_BS: [B, S] int64; the last token is the asked key.
    answers_B: [B] int64, its value.
    depths_B: [B] float64, the asked pair's place: 0 at the row's start, 1 right before the question.
    """

    tokens_BS: Tensor
    answers_B: Tensor
    depths_B: np.ndarray


def training_rows(random: np.random.Generator, rows: int, length: int, pairs: int, questions: int) -> Batch:
    """Rows that end with `questions` questions, each about a random pair; only their answers are targets."""
    tokens_BS, targets_BS = np.empty((rows, length), np.int64), np.full((rows, length), IGNORE, np.int64)
    context = length - WIDTH * questions
    for tokens_S, targets_S in zip(tokens_BS, targets_BS):
        _, keys, values = _hide_pairs(tokens_S[:context], random, pairs)
        asked = random.integers(pairs, size=questions)
        end = tokens_S[context:].reshape(questions, WIDTH)
        end[:] = np.stack((np.full(questions, QUESTION), keys[asked], values[asked]), axis=1)
        targets_S[context + 1 :: WIDTH] = values[asked]
    return Batch(torch.from_numpy(tokens_BS), torch.from_numpy(targets_BS), None)


def question_rows(random: np.random.Generator, rows: int, length: int, pairs: int) -> Questions:
    """Rows with one question each; over the rows, the asked pair's rank among the pairs rises from first to last."""
    tokens_BS = np.empty((rows, length), np.int64)
    answers_B, depths_B = np.empty(rows, np.int64), np.empty(rows)
    context = length - 2
    for row, tokens_S in enumerate(tokens_BS):
        starts, keys, values = _hide_pairs(tokens_S[:context], random, pairs)
        asked = row * pairs // rows
        tokens_S[context:] = QUESTION, keys[asked]
        answers_B[row], depths_B[row] = values[asked], starts[asked] / max(1, context - WIDTH)
    return Questions(torch.from_numpy(tokens_BS), torch.from_numpy(answers_B), depths_B)


def _hide_pairs(
    context: np.ndarray, random: np.random.Generator, pairs: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fill `context` with noise and pairs at random places; returns the pairs' starts, ascending, keys and values."""
    context[:] = random.integers(FIRST_NOISE, VOCABULARY, size=len(context))
    # distinct places of a row in which each pair has one token, then each place moved by the pairs before it
    places = np.sort(random.choice(len(context) - (WIDTH - 1) * pairs, size=pairs, replace=False))
    starts = places + (WIDTH - 1) * np.arange(pairs)
    keys = FIRST_KEY + random.choice(KEYS, size=pairs, replace=False)
    values = FIRST_VALUE + random.integers(VALUES, size=pairs)
    for offset, tokens in enumerate((np.full(pairs, PAIR), keys, values)):
        context[starts + offset] = tokens
    return starts, keys, values
