"""Held-out documents as sequences, in the order of the file, each once: the same for every evaluation of a run.

Sequence i belongs to rank i mod R. All ranks get equally many, because evaluation uses collectives: where the number
does not divide by R, the remaining ranks get a sequence without targets, which changes no mean.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from trinity.data.sources.source import Source
from trinity.data.stream.collate import PackedSequence, read_pieces
from trinity.data.stream.packing import Piece
from trinity_kernels.cross_entropy import IGNORE

NAME = "validation"


def validation_sequences(
    source: Source,
    sequence_length: int,
    count: int,
    loss_on_document_start: bool = True,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[PackedSequence]:
    """Pack the documents one after the other and yield this rank's share of the first `count` sequences.

    The last sequence of a source may be short: it is padded with BOS, as a separate document, without targets.

    Args:
        source: held-out documents.
        sequence_length: tokens of a sequence.
        count: sequences at most, over all ranks.
        loss_on_document_start: BOS is the target of a document's last token; otherwise it has no target.
        rank, ranks: r and R.
    """
    after_document = source.bos_id if loss_on_document_start else IGNORE
    number = -1
    for number, pieces in enumerate(islice(_packed(source, sequence_length), count)):
        if number % ranks == rank:
            yield _padded(read_pieces(pieces, {NAME: source}, after_document), sequence_length, source.bos_id)
    if rank > number % ranks:  # the last sequences did not reach this rank
        yield _padded(PackedSequence(np.empty((3, 0), np.int32), []), sequence_length, source.bos_id)


def _packed(source: Source, sequence_length: int) -> Iterator[list[Piece]]:
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


def _padded(sequence: PackedSequence, sequence_length: int, bos_id: int) -> PackedSequence:
    missing = sequence_length - sequence.values_3S.shape[1]
    padding_31 = np.array([[bos_id], [IGNORE], [len(sequence.pieces)]], np.int32)
    padded_3S = np.concatenate([sequence.values_3S, padding_31.repeat(missing, axis=1)], axis=1)
    return PackedSequence(padded_3S, sequence.pieces)
