"""Held-out documents as sequences: in the order of the file, each once, for a loss that can be compared over a run.

Row i belongs to rank i mod R. All ranks take equally many, or the others would wait in a collective for ever: where the
rows do not divide, those that lack one get a row without targets, which changes no mean.
"""

from collections.abc import Iterator
from itertools import islice

import torch

from trinity.data.stream.collate import IGNORE, Sequence, materialise
from trinity.data.stream.packing import Piece
from trinity.data.stream.shuffle import Source

NAME = "validation"


def validation_sequences(
    source: Source,
    sequence_length: int,
    count: int,
    loss_on_document_start: bool = True,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Sequence]:
    """Pack the documents one after the other and yield this rank's of the first `count` rows, or of all there are.

    The last row of a source may be short: it is filled with BOS, as a document of its own, without targets.

    Args:
        source: held-out documents.
        sequence_length: tokens of a row.
        count: rows at most, over all ranks.
        loss_on_document_start: whether BOS is the target of a document's last token, or nothing.
        rank, ranks: r and R.
    """
    after_document = source.bos_id if loss_on_document_start else IGNORE
    number = -1
    for number, pieces in enumerate(islice(_rows(source, sequence_length), count)):
        if number % ranks == rank:
            yield _padded(materialise(pieces, {NAME: source}, after_document), sequence_length, source.bos_id)
    if rank > number % ranks:  # the last round of rows did not reach this rank
        nothing = torch.empty(0, dtype=torch.int64)
        yield _padded(Sequence(nothing, nothing, nothing.int(), []), sequence_length, source.bos_id)


def _rows(source: Source, sequence_length: int) -> Iterator[list[Piece]]:
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
