"""Read the pieces of a packed sequence as token ids, and collate sequences into a batch.

The target of a token is the next token of its document. The target of a document's last token is BOS, with which the
next document begins: the model learns that a document begins here, not which one.

Shapes: B sequences, S tokens of one; 3: its tokens, targets and document ids.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trinity.data.sources.source import Source
from trinity.data.stream.packing import Piece


class PackedSequence(NamedTuple):
    """One sequence, as worker processes send it.

    values_3S: int32: tokens; targets, IGNORE where there is none; document ids 0, 1, 2, … within the sequence.
    pieces: the parts of documents that the tokens are from.
    """

    values_3S: np.ndarray
    pieces: list[Piece]

    @property
    def tokens(self) -> Tensor:
        """[S] int64."""
        return torch.from_numpy(self.values_3S[0]).long()

    @property
    def targets(self) -> Tensor:
        """[S] int64."""
        return torch.from_numpy(self.values_3S[1]).long()

    @property
    def document_ids(self) -> Tensor:
        """[S] int32."""
        return torch.from_numpy(self.values_3S[2])


@dataclass
class Batch:
    """One rank's sequences of one step, or a microbatch of them.

    tokens_BS, targets_BS: int64; IGNORE where there is no target.
    document_ids_BS: int32, for the document mask; None without one.
    pieces: of each sequence; empty in a microbatch.
    documents: how many documents the rows of a microbatch hold, each row beginning a new one; otherwise None.
    row_document_ids_BS: document ids of the whole rows, where the batch is a part of their columns; otherwise None.
    """

    tokens_BS: Tensor
    targets_BS: Tensor
    document_ids_BS: Tensor | None
    pieces: list[list[Piece]] = field(default_factory=list)
    documents: int | None = None
    row_document_ids_BS: Tensor | None = None

    def columns(self, columns: slice) -> "Batch":
        """A part of the columns of every row, with the document ids of whole rows, which attention needs.

        All columns: the batch itself.
        """
        ids_BS = self.document_ids_BS
        if columns == slice(0, self.tokens_BS.shape[1]):
            return self
        return Batch(
            self.tokens_BS[:, columns],
            self.targets_BS[:, columns],
            None if ids_BS is None else ids_BS[:, columns],
            self.pieces,
            row_document_ids_BS=ids_BS,
        )

    def microbatches(self, size: int, device: torch.device) -> Iterator["Batch"]:
        """Consecutive parts of `size` sequences on the device."""
        row_ids_BS = self.document_ids_BS if self.row_document_ids_BS is None else self.row_document_ids_BS
        for start in range(0, self.tokens_BS.shape[0], size):
            rows = slice(start, start + size)
            yield Batch(
                self.tokens_BS[rows].to(device, non_blocking=True),
                self.targets_BS[rows].to(device, non_blocking=True),
                _rows_on_device(self.document_ids_BS, rows, device),
                documents=None if row_ids_BS is None else count_documents(row_ids_BS[rows]),
                row_document_ids_BS=_rows_on_device(self.row_document_ids_BS, rows, device),
            )


def _rows_on_device(x_BS: Tensor | None, rows: slice, device: torch.device) -> Tensor | None:
    return None if x_BS is None else x_BS[rows].to(device, non_blocking=True)


def count_documents(document_ids_BS: Tensor) -> int:
    """Number of documents in a batch on the CPU, each row beginning a new one."""
    return len(document_ids_BS) + int((document_ids_BS[:, 1:] != document_ids_BS[:, :-1]).sum())


def read_pieces(pieces: list[Piece], sources: Mapping[str, Source], after_document: int) -> PackedSequence:
    """Read the tokens of one sequence.

    Args:
        pieces: at least one; all but the last go to the end of their document, as the packers make them.
        sources: name → documents.
        after_document: target of a document's last token: BOS, or IGNORE.
    """
    lengths = [piece.length for piece in pieces]
    ends = list(accumulate(lengths))
    values_3S = np.empty((3, ends[-1]), np.int32)
    tokens_S, targets_S, ids_S = values_3S
    for (name, document, start, length), end in zip(pieces, ends):
        tokens_S[end - length : end] = sources[name].read(document, start, length)
    targets_S[:-1] = tokens_S[1:]
    targets_S[np.array(ends[:-1], np.int64) - 1] = after_document
    targets_S[-1] = _next_token(pieces[-1], sources, after_document)
    ids_S[:] = np.repeat(np.arange(len(pieces), dtype=np.int32), lengths)
    return PackedSequence(values_3S, pieces)


def collate(sequences: list[PackedSequence], sequence_length: int, pin: bool = False) -> Batch:
    """Stack sequences of one length as one batch.

    Args:
        sequences: B of them.
        sequence_length: S where there are none, for tensors of shape [0, S].
        pin: allocate the batch in pinned memory.
    """
    shape = (len(sequences), sequences[0].values_3S.shape[1] if sequences else sequence_length)
    tokens_BS, targets_BS = (torch.empty(shape, dtype=torch.int64, pin_memory=pin) for _ in range(2))
    document_ids_BS = torch.empty(shape, dtype=torch.int32, pin_memory=pin)
    for row, sequence in enumerate(sequences):
        tokens_BS[row], targets_BS[row], document_ids_BS[row] = torch.from_numpy(sequence.values_3S)
    return Batch(tokens_BS, targets_BS, document_ids_BS, [sequence.pieces for sequence in sequences])


def _next_token(piece: Piece, sources: Mapping[str, Source], after_document: int) -> int:
    source, end = sources[piece.source], piece.start + piece.length
    if end == source.length(piece.document):
        return after_document
    return int(source.read(piece.document, end, 1)[0])
