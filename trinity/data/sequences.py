"""A row of tokens as the model takes it: pieces of documents, their targets, and which document each token is of.

The target of a token is the next token of its document. After a document's last token comes BOS, with which the next
one begins: the model learns that something new starts here, and never what it is about.

Shapes: N rows, S tokens of one.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trinity.data.packing import Piece
from trinity.data.shards import TokenSource

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


def materialise(pieces: list[Piece], sources: Mapping[str, TokenSource], after_document: int) -> Sequence:
    """Read the tokens of a row's pieces.

    Args:
        pieces: at least one; all but the last go to the end of their document, as packers deal them.
        sources: name → documents.
        after_document: target of a document's last token: BOS, or IGNORE.
    """
    parts = [sources[name].read(document, start, length) for name, document, start, length in pieces]
    lengths = [piece.length for piece in pieces]
    tokens_S = np.concatenate(parts).astype(np.int64)
    targets_S = np.empty_like(tokens_S)
    targets_S[:-1] = tokens_S[1:]
    targets_S[np.cumsum(lengths)[:-1] - 1] = after_document
    targets_S[-1] = _next_token(pieces[-1], sources, after_document)
    ids_S = np.repeat(np.arange(len(pieces), dtype=np.int32), lengths)
    return Sequence(torch.from_numpy(tokens_S), torch.from_numpy(targets_S), torch.from_numpy(ids_S), pieces)


def stack(rows: list[Sequence], sequence_length: int) -> SequenceBatch:
    """Rows of `sequence_length` tokens as one batch; none give tensors of shape [0, S]."""
    empty = torch.empty(0, sequence_length, dtype=torch.int64)
    return SequenceBatch(
        torch.stack([row.tokens for row in rows]) if rows else empty,
        torch.stack([row.targets for row in rows]) if rows else empty,
        torch.stack([row.document_ids for row in rows]) if rows else empty.int(),
        [row.pieces for row in rows],
    )


def _next_token(piece: Piece, sources: Mapping[str, TokenSource], after_document: int) -> int:
    source, end = sources[piece.source], piece.start + piece.length
    if end == source.length(piece.document):
        return after_document
    return int(source.read(piece.document, end, 1)[0])
