"""Held-out documents as sequences: in the order of the file, each once, for a loss that can be compared over a run."""

from collections.abc import Iterator

import torch

from trinity.data.packing import Piece
from trinity.data.sequences import IGNORE, Sequence, materialise
from trinity.data.shards import TokenSource

NAME = "validation"


def validation_sequences(
    source: TokenSource, sequence_length: int, count: int, loss_on_document_start: bool = True
) -> Iterator[Sequence]:
    """Pack the documents one after the other and yield at most `count` rows; fewer where the source ends before.

    The last row of a source may be short: it is filled with BOS, as a document of its own, without targets.

    Args:
        source: held-out documents.
        sequence_length: tokens of a row.
        count: rows at most.
        loss_on_document_start: whether BOS is the target of a document's last token, or nothing.
    """
    after_document = source.bos_id if loss_on_document_start else IGNORE
    for number, pieces in enumerate(_rows(source, sequence_length)):
        if number == count:
            return
        yield _padded(materialise(pieces, {NAME: source}, after_document), sequence_length, source.bos_id)


def _rows(source: TokenSource, sequence_length: int) -> Iterator[list[Piece]]:
    pieces: list[Piece] = []
    room = sequence_length
    for document in range(source.documents):
        start, length = 0, source.length(document)
        while start < length:
            piece = Piece(NAME, document, start, min(room, length - start))
            pieces.append(piece)
            start += piece.length
            room -= piece.length
            if not room:
                yield pieces
                pieces, room = [], sequence_length
    if pieces:
        yield pieces


def _padded(row: Sequence, sequence_length: int, bos_id: int) -> Sequence:
    missing = sequence_length - len(row.tokens)
    if not missing:
        return row
    return Sequence(
        torch.cat([row.tokens, torch.full((missing,), bos_id)]),
        torch.cat([row.targets, torch.full((missing,), IGNORE)]),
        torch.cat([row.document_ids, torch.full((missing,), len(row.pieces), dtype=torch.int32)]),
        row.pieces,
    )
