"""Read the pieces of a packed sequence as token ids, and collate sequences into a batch.

The target of a token is the next token of its document. The target of a document's last token is BOS, with which the
next document begins: the model learns that a document begins here, not which one. For fine-tuning, a document is an
example: its last token has no target, nor have the tokens that its loss mask leaves out.

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
from trinity_kernels.cross_entropy import IGNORE

PADDING_ID = -1
"""Document id of padding: tokens at the end of a row that belong to no document and have no target."""


class PackedSequence(NamedTuple):
    """One sequence, as worker processes send it.

    values_3S: int32: tokens; targets, IGNORE where there is none; document ids 0, 1, 2, … within the sequence, and
        PADDING_ID for padding at its end.
    pieces: the parts of documents that the tokens are from.
    weights_S: fp32: the weight of each target in the loss (loss.per); None: all targets weigh the same.
    """

    values_3S: np.ndarray
    pieces: list[Piece]
    weights_S: np.ndarray | None = None

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
    document_ids_BS: int32, for the document mask; PADDING_ID for padding at a row's end; None without a mask.
    pieces: of each sequence; empty in a microbatch.
    documents: how many documents the rows of a microbatch hold, each row beginning a new one, padding counted as one;
        otherwise None.
    weights_BS: fp32, the weight of each target in the loss, 0 where there is no target: 1/(targets of its example) with
        loss.per=example, so that a row's weights sum to its examples; None with loss.per=token.
    row_document_ids_BS: document ids of the whole rows, where the batch is a part of their columns; otherwise None.
    """

    tokens_BS: Tensor
    targets_BS: Tensor
    document_ids_BS: Tensor | None
    pieces: list[list[Piece]] = field(default_factory=list)
    documents: int | None = None
    weights_BS: Tensor | None = None
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
            weights_BS=None if self.weights_BS is None else self.weights_BS[:, columns],
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
                weights_BS=_rows_on_device(self.weights_BS, rows, device),
            )


def _rows_on_device(x_BS: Tensor | None, rows: slice, device: torch.device) -> Tensor | None:
    return None if x_BS is None else x_BS[rows].to(device, non_blocking=True)


def count_documents(document_ids_BS: Tensor) -> int:
    """Number of documents in a batch on the CPU, each row beginning a new one."""
    return len(document_ids_BS) + int((document_ids_BS[:, 1:] != document_ids_BS[:, :-1]).sum())


def count_padding(batch: Batch) -> Tensor:
    """[B] padding tokens of each row of a batch on the CPU, in its columns."""
    if batch.document_ids_BS is None:
        return torch.zeros(len(batch.tokens_BS), dtype=torch.int64)
    return (batch.document_ids_BS == PADDING_ID).sum(dim=1)


def read_pieces(
    pieces: list[Piece], sources: Mapping[str, Source], after_document: int, masked: bool = False
) -> PackedSequence:
    """Read the tokens of one sequence.

    Args:
        pieces: at least one; all but the last go to the end of their document, as the packers make them.
        sources: name → documents.
        after_document: target of a document's last token: BOS, or IGNORE.
        masked: only tokens that the mask of their source marks are targets; after_document must be IGNORE.
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
    if masked:
        assert after_document == IGNORE
        for (name, document, start, length), end in zip(pieces, ends):
            source = sources[name]
            count = min(length, source.length(document) - start - 1)  # a document's last token has no target
            untrained = ~source.read_mask(document, start + 1, count)
            targets_S[end - length : end - length + count][untrained] = IGNORE
    return PackedSequence(values_3S, pieces)


def pad(sequence: PackedSequence, sequence_length: int, token: int, document_id: int = PADDING_ID) -> PackedSequence:
    """Add `token`, without targets, at the end of a sequence, up to `sequence_length` tokens."""
    missing = sequence_length - sequence.values_3S.shape[1]
    padding_31 = np.array([[token], [IGNORE], [document_id]], np.int32)
    weights_S = None if sequence.weights_S is None else np.pad(sequence.weights_S, (0, missing))
    values_3S = np.concatenate([sequence.values_3S, padding_31.repeat(missing, axis=1)], axis=1)
    return PackedSequence(values_3S, sequence.pieces, weights_S)


def weigh_examples(sequence: PackedSequence) -> PackedSequence:
    """Give each target the weight 1/(targets of its example), for sequences of whole examples (loss.per=example)."""
    _, targets_S, ids_S = sequence.values_3S
    valid_S = targets_S != IGNORE
    counts = np.bincount(ids_S[valid_S], minlength=len(sequence.pieces))
    weights_S = np.zeros(len(ids_S), np.float32)
    weights_S[valid_S] = 1.0 / counts[ids_S[valid_S]]
    return sequence._replace(weights_S=weights_S)


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
    weights_BS = None
    if sequences and sequences[0].weights_S is not None:
        weights_BS = torch.empty(shape, dtype=torch.float32, pin_memory=pin)
        for row, sequence in enumerate(sequences):
            weights_BS[row] = torch.from_numpy(sequence.weights_S)
    pieces = [sequence.pieces for sequence in sequences]
    return Batch(tokens_BS, targets_BS, document_ids_BS, pieces, weights_BS=weights_BS)


def _next_token(piece: Piece, sources: Mapping[str, Source], after_document: int) -> int:
    source, end = sources[piece.source], piece.start + piece.length
    if end == source.length(piece.document):
        return after_document
    return int(source.read(piece.document, end, 1)[0])
