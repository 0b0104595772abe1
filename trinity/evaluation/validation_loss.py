"""Validation loss: nats per token, and bits per byte, which does not depend on the tokenizer."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from trinity.data.stream.collate import PackedSequence, collate
from trinity.models.trinity import Trinity
from trinity.parallel.context_parallel import ContextParallel, row_parts
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
    context: ContextParallel | None = None,
) -> dict[str, float]:
    """Mean cross-entropy of the valid targets over all ranks. Routing counts are dropped: expert biases do not change.

    Args:
        sequences: this rank's packed rows, the same number on every rank.
        microbatch: rows per forward pass.
        byte_lengths_V: [V] bytes of text per token; without it there are no bits per byte.
        beat: called after each forward pass.
        context: the ranks that have the same rows as this one, and divide them by columns; None: no other has.
    Returns:
        "loss", and "bits_per_byte": Σ CE / ln 2 / bytes of the targets. BOS, which begins the next document, is a
        target of 0 bytes, so its loss is spread over the text.
    """
    ce, valid, text_bytes = 0.0, 0, 0
    for rows in _microbatches(sequences, microbatch):
        batch = collate(rows, len(rows[0].tokens))
        if not document_mask:
            batch.document_ids_BS = None
        if context is not None:
            batch = batch.columns(context.columns(batch.tokens_BS.shape[1]))
        (own,) = batch.microbatches(len(rows), device)
        parts = row_parts(context, own.tokens_BS, own.row_document_ids_BS, own.documents, model.attention_engine)
        losses = model(
            own.tokens_BS,
            document_ids_BS=own.document_ids_BS,
            targets_BS=own.targets_BS,
            documents=own.documents,
            with_sequence_loss=False,
            parts=parts,
        )
        ce += losses.ce_BS.double().sum().item()
        counted = batch.targets_BS[batch.targets_BS != IGNORE]
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
    return metrics


def _microbatches(sequences: Iterable[PackedSequence], size: int) -> Iterator[list[PackedSequence]]:
    group: list[PackedSequence] = []
    for sequence in sequences:
        group.append(sequence)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
