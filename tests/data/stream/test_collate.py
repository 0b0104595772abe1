"""Batches against the sequences they are made of, and microbatches against their batch."""

import numpy as np
import pytest
import torch

from trinity.data.stream.collate import Batch, PackedSequence, collate, count_documents
from trinity.data.stream.packing import Piece

B, S = 6, 8


def sequences() -> list[PackedSequence]:
    """Sequences in which all values differ."""
    values = np.arange(B * 3 * S, dtype=np.int32).reshape(B, 3, S)
    return [PackedSequence(values[row], [Piece("a", row, 0, S)]) for row in range(B)]


def test_a_batch_is_its_sequences() -> None:
    rows = sequences()
    batch = collate(rows, S)
    assert (batch.tokens_BS.dtype, batch.targets_BS.dtype, batch.document_ids_BS.dtype) == (
        torch.int64,
        torch.int64,
        torch.int32,
    )
    for row, sequence in enumerate(rows):
        assert torch.equal(batch.tokens_BS[row], sequence.tokens)
        assert torch.equal(batch.targets_BS[row], sequence.targets)
        assert torch.equal(batch.document_ids_BS[row], sequence.document_ids)
        assert batch.tokens_BS[row].tolist() == sequence.values_3S[0].tolist()
    assert batch.pieces == [sequence.pieces for sequence in rows]


def test_no_sequences_have_a_length() -> None:
    """A rank without a row in a batch still has tensors of the right shape."""
    batch = collate([], S)
    assert batch.tokens_BS.shape == batch.targets_BS.shape == batch.document_ids_BS.shape == (0, S)


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_microbatches_are_the_batch_in_order(size: int, document_mask: bool) -> None:
    batch = collate(sequences(), S)
    if not document_mask:
        batch.document_ids_BS = None
    parts: list[Batch] = list(batch.microbatches(size, torch.device("cpu")))
    assert [len(part.tokens_BS) for part in parts] == [size] * (B // size)
    assert torch.equal(torch.cat([part.tokens_BS for part in parts]), batch.tokens_BS)
    assert torch.equal(torch.cat([part.targets_BS for part in parts]), batch.targets_BS)
    if document_mask:
        assert torch.equal(torch.cat([part.document_ids_BS for part in parts]), batch.document_ids_BS)
        # all ids differ: each token is a document
        assert [part.documents for part in parts] == [size * S] * (B // size)
    else:
        assert all(part.document_ids_BS is None and part.documents is None for part in parts)


def test_number_of_documents() -> None:
    """Each row begins a document, also with the id at which the row before it ended."""
    assert count_documents(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [5, 0, 0, 9]], dtype=torch.int32)) == 6
    assert count_documents(torch.empty(0, 4, dtype=torch.int32)) == 0
