"""Held-out documents as sequences, in the order of the file, each once: the same for every evaluation of a run.

Best-fit packing takes whole documents, a window of the file at a time.

Sequence i belongs to rank i mod R. All ranks get equally many, because evaluation uses collectives: where the number
does not divide by R, the remaining ranks get a sequence without targets, which changes no mean.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from trinity.data.sources.source import Source
from trinity.data.stream.best_fit import check_fits, pack_best_fit
from trinity.data.stream.collate import PADDING_ID, PackedSequence, pad, read_pieces
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
    *,
    best_fit_rows: int = 0,
    masked: bool = False,
) -> Iterator[PackedSequence]:
    """Pack the documents one after the other and yield this rank's share of the first `count` sequences.

    The last sequence of a source may be short: it is padded with BOS, as a separate document, without targets.

    Args:
        source: held-out documents.
        sequence_length: tokens of a sequence.
        count: sequences at most, over all ranks.
        loss_on_document_start: BOS is the target of a document's last token; otherwise it has no target.
        rank, ranks: r and R.
        best_fit_rows: pack whole documents, best-fit decreasing over windows of this number of rows; 0: in file order.
        masked: only tokens that the mask of the source marks are targets.
    Raises:
        UserError: with best_fit_rows, a document is longer than a sequence.
    """
    whole = best_fit_rows > 0
    padding_id = PADDING_ID if whole else None
    after_document = source.bos_id if loss_on_document_start and not (whole or masked) else IGNORE
    rows = _best_fit(source, sequence_length, best_fit_rows) if whole else _packed(source, sequence_length)
    number = -1
    for number, pieces in enumerate(islice(rows, count)):
        if number % ranks == rank:
            sequence = read_pieces(pieces, {NAME: source}, after_document, masked)
            yield _padded(sequence, sequence_length, source.bos_id, padding_id)
    if rank > number % ranks:  # the last sequences did not reach this rank
        yield _padded(PackedSequence(np.empty((3, 0), np.int32), []), sequence_length, source.bos_id, padding_id)


def _best_fit(source: Source, sequence_length: int, window_rows: int) -> Iterator[list[Piece]]:
    """Whole documents in rows, windows of documents in the order of the file."""
    window: list[tuple[int, int]] = []  # (document, its tokens)
    tokens = 0
    for document in range(source.documents):
        length = source.length(document)
        check_fits(f"a validation set ({NAME})", document, length, sequence_length)
        window.append((document, length))
        tokens += length
        if tokens >= window_rows * sequence_length or document + 1 == source.documents:
            for row in pack_best_fit([length for _, length in window], sequence_length):
                yield [Piece(NAME, window[at][0], 0, window[at][1]) for at in row]
            window, tokens = [], 0


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


def _padded(sequence: PackedSequence, sequence_length: int, bos_id: int, padding_id: int | None) -> PackedSequence:
    return pad(sequence, sequence_length, bos_id, len(sequence.pieces) if padding_id is None else padding_id)
