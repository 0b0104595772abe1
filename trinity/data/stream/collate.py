"""A row of tokens as the model takes it: pieces of documents, their targets, and which document each token is of.

The target of a token is the next token of its document. After a document's last token comes BOS, with which the next
one begins: the model learns that something new starts here, and never what it is about.

Shapes: N rows, S tokens of one.
"""

from collections.abc import Mapping
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trinity.data.stream.packing import Piece
from trinity.data.stream.shuffle import Source

IGNORE = -100


class Sequence(NamedTuple):
    """One row.

    tokens: [S] int64.
    targets: [S] int64; IGNORE where there is none.
    document_ids: [S] int32: 0, 1, 2, … within the row.
    pieces: where the tokens are from.
    """

    tokens: Tensor
    targets: Tensor
    document_ids: Tensor
    pieces: list[Piece]


class SequenceBatch(NamedTuple):
    """Rows of one step: tokens and targets [N, S] int64, document_ids [N, S] int32, and the pieces of each row."""

    tokens: Tensor
    targets: Tensor
    document_ids: Tensor
    pieces: list[list[Piece]]


def materialise(pieces: list[Piece], sources: Mapping[str, Source], after_document: int) -> Sequence:
    """Read the tokens of a row's pieces.

    Args:
        pieces: at least one; all but the last go to the end of their document, as packers deal them.
        sources: name → documents.
        after_document: target of a document's last token: BOS, or IGNORE.
    """
    lengths = [piece.length for piece in pieces]
    ends = list(accumulate(lengths))
    tokens_S = np.empty(ends[-1], np.int64)
    for (name, document, start, length), end in zip(pieces, ends):
        tokens_S[end - length : end] = sources[name].read(document, start, length)
    targets_S = np.empty_like(tokens_S)
    targets_S[:-1] = tokens_S[1:]
    targets_S[np.array(ends[:-1], np.int64) - 1] = after_document
    targets_S[-1] = _next_token(pieces[-1], sources, after_document)
    ids_S = np.repeat(np.arange(len(pieces), dtype=np.int32), lengths)
    return Sequence(torch.from_numpy(tokens_S), torch.from_numpy(targets_S), torch.from_numpy(ids_S), pieces)


def stack(rows: list[Sequence], sequence_length: int, pin: bool = False) -> SequenceBatch:
    """Rows of one length as one batch, in pinned memory if asked; none give tensors of shape [0, sequence_length]."""
    shape = (len(rows), len(rows[0].tokens) if rows else sequence_length)
    batch = SequenceBatch(
        torch.empty(shape, dtype=torch.int64, pin_memory=pin),
        torch.empty(shape, dtype=torch.int64, pin_memory=pin),
        torch.empty(shape, dtype=torch.int32, pin_memory=pin),
        [row.pieces for row in rows],
    )
    for at, row in enumerate(rows):
        batch.tokens[at], batch.targets[at], batch.document_ids[at] = row.tokens, row.targets, row.document_ids
    return batch


def _next_token(piece: Piece, sources: Mapping[str, Source], after_document: int) -> int:
    source, end = sources[piece.source], piece.start + piece.length
    if end == source.length(piece.document):
        return after_document
    return int(source.read(piece.document, end, 1)[0])
