"""Validation rows against the concatenated documents, and the entropy against a count in plain Python."""

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from trinity.data.stream.validation import validation_sequences
from trinity.errors import UserError
from trinity.reporting.unigram import unigram_entropy

S = 16


@pytest.mark.parametrize("loss_on_document_start", [True, False])
@pytest.mark.parametrize("missing", [0, 1, 15])
def test_documents_end_to_end(
    make_source: Callable, random_documents: Callable, missing: int, loss_on_document_start: bool
) -> None:
    """The last row lacks `missing` tokens and is padded with BOS, without targets."""
    documents = random_documents(30, 40, 8)
    documents.append([0] + [7] * ((-sum(map(len, documents)) - missing - 1) % S + S))
    end = 0 if loss_on_document_start else -100
    tokens = [token for ids in documents for token in ids] + [0] * missing
    targets = [token for ids in documents for token in [*ids[1:], end]] + [-100] * missing
    numbers = [number for number, ids in enumerate(documents) for _ in ids] + [len(documents)] * missing
    rows = list(validation_sequences(make_source("s", documents), S, 10**6, loss_on_document_start))
    assert len(rows) * S == len(tokens)
    for at, row in zip(range(0, len(tokens), S), rows):
        assert row.tokens.tolist() == tokens[at : at + S]
        assert row.targets.tolist() == targets[at : at + S]
        assert row.document_ids.tolist() == [number - numbers[at] for number in numbers[at : at + S]]
        assert (row.tokens.dtype, row.targets.dtype, row.document_ids.dtype) == (torch.int64, torch.int64, torch.int32)


def test_at_most_count_rows(make_source: Callable, random_documents: Callable) -> None:
    source = make_source("s", random_documents(30, 40, 8))
    whole = list(validation_sequences(source, S, 10**6))
    assert [row.pieces for row in validation_sequences(source, S, 3)] == [row.pieces for row in whole[:3]]
    assert list(validation_sequences(source, S, 0)) == []


def test_entropy_against_counting(make_source: Callable, random_documents: Callable) -> None:
    """Sums of 100 terms in float64: 1e-12 is a thousand roundings."""
    documents = {"a": random_documents(50, 40, 1), "b": random_documents(9, 90, 2)}
    p = Counter()
    for name, weight in {"a": 0.25, "b": 0.75}.items():
        tokens = [token for ids in documents[name] for token in ids]
        for token, count in Counter(tokens).items():
            p[token] += weight * count / len(tokens)
    expected = -sum(value * math.log(value) for value in p.values())
    sources = {name: make_source(name, ids) for name, ids in documents.items()}
    assert unigram_entropy(sources, {"a": 1, "b": 3}) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(UserError, match="names c, which is no source"):
        unigram_entropy(sources, {"a": 1, "c": 1})


def test_entropy_of_equally_frequent_tokens(make_source: Callable) -> None:
    """Eight tokens, each an eighth: three bits, exact but for the logarithm's rounding."""
    source = make_source("s", [[0, 1, 2, 3], [0, 4, 5, 6], [1, 2, 3, 7], [4, 5, 6, 7]])
    assert unigram_entropy({"s": source}, {"s": 1}) == pytest.approx(3 * math.log(2), rel=1e-15)
