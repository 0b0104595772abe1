"""Validation loss: nats per token, and bits per byte, which does not depend on the tokenizer.

By position: the mean loss of the targets with 1, 2–3, 4–7, 8–15, … tokens of context. A model that uses its context has
a lower loss where that is longer.

Shapes: B rows, S tokens of a row, K ranges of context.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from trinity.data.stream.collate import PackedSequence, count_documents
from trinity.models.trinity import Trinity
from trinity_kernels.cross_entropy import IGNORE


@torch.no_grad()
def evaluate(
    model: Trinity,
    sequences: Iterable[PackedSequence],
    microbatch: int,
    document_mask: bool,
    byte_lengths_V: Tensor | None,
    device: torch.device,
    beat: Callable[[], None] | None = None,
    by_position: bool = False,
) -> dict[str, float]:
    """Mean cross-entropy of the valid targets over all ranks. Routing counts are dropped: expert biases do not change.

    Args:
        sequences: this rank's packed rows, the same number on every rank.
        microbatch: rows per forward pass.
        byte_lengths_V: [V] bytes of text per token; without it there are no bits per byte.
        beat: called after each forward pass.
        by_position: also return the loss by the tokens' context: in the document with document_mask, else in the row.
    Returns:
        "loss", and "bits_per_byte": Σ CE / ln 2 / bytes of the targets. BOS, which begins the next document, is a
        target of 0 bytes, so its loss is spread over the text. By position, "loss_at.C" for C = 1, 2, 4, …: the loss of
        the targets with C to 2·C − 1 tokens of context.
    """
    ce, valid, text_bytes = 0.0, 0, 0
    by_context = LossByContext()
    for rows in _microbatches(sequences, microbatch):
        targets_BS = torch.stack([row.targets for row in rows])
        ids_BS = torch.stack([row.document_ids for row in rows]) if document_mask else None
        losses = model(
            torch.stack([row.tokens for row in rows]).to(device),
            document_ids_BS=None if ids_BS is None else ids_BS.to(device),
            targets_BS=targets_BS.to(device),
            documents=None if ids_BS is None else count_documents(ids_BS),
            with_sequence_loss=False,
        )
        ce += losses.ce_BS.double().sum().item()
        if by_position:
            by_context.add(losses.ce_BS, targets_BS, context_lengths(targets_BS.shape, ids_BS))
        counted = targets_BS[targets_BS != IGNORE]
        valid += counted.numel()
        if byte_lengths_V is not None:
            text_bytes += int(byte_lengths_V[counted].sum())
        if beat is not None:
            beat()
    sums = torch.tensor([ce, valid, text_bytes], dtype=torch.float64)  # integers are exact to 2⁵³
    if dist.is_initialized():
        dist.all_reduce(sums)
    ce, valid, text_bytes = sums.tolist()
    metrics = {"loss": ce / max(valid, 1)}
    if byte_lengths_V is not None:
        metrics["bits_per_byte"] = ce / math.log(2) / max(text_bytes, 1)
    return metrics | (by_context.means() if by_position else {})


def context_lengths(shape: torch.Size, document_ids_BS: Tensor | None) -> Tensor:
    """[B, S] int64: tokens up to and including each one, in its row, or in its document if ids are given."""
    positions_BS = torch.arange(shape[1]).expand(shape)
    if document_ids_BS is None:
        return positions_BS + 1
    starts_BS = torch.zeros(shape, dtype=torch.int64)
    changes_BS = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
    starts_BS[:, 1:] = positions_BS[:, 1:] * changes_BS
    return positions_BS - starts_BS.cummax(dim=1).values + 1


class LossByContext:
    """Sums of losses and targets in ranges of context: 1, 2–3, 4–7, … tokens."""

    def __init__(self) -> None:
        self._sums_2K = torch.zeros(2, 64, dtype=torch.float64)

    def add(self, ce_BS: Tensor, targets_BS: Tensor, contexts_BS: Tensor) -> None:
        """Add the losses of a batch.

        Args:
            ce_BS: [B, S] loss of each target, on any device.
            targets_BS: [B, S] int64; IGNORE: not counted.
            contexts_BS: [B, S] int64, tokens of context, at least 1.
        """
        counted_BS = targets_BS != IGNORE
        ranges = contexts_BS[counted_BS].double().log2().long()  # float64: right for contexts below 2⁴⁸
        ce = ce_BS.cpu().double()[counted_BS]
        self._sums_2K.index_add_(1, ranges, torch.stack((ce, torch.ones_like(ce))))

    def means(self) -> dict[str, float]:
        """Mean loss of each range with a target, as "loss_at.C", over all ranks; every rank must call this."""
        if dist.is_initialized():
            dist.all_reduce(self._sums_2K)
        ce, counts = self._sums_2K.tolist()
        return {f"loss_at.{1 << k}": ce[k] / counts[k] for k in range(64) if counts[k]}


def _microbatches(sequences: Iterable[PackedSequence], size: int) -> Iterator[list[PackedSequence]]:
    group: list[PackedSequence] = []
    for sequence in sequences:
        group.append(sequence)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
