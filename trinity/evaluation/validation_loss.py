"""Validation loss: nats per trained token, bits per byte, which does not depend on the tokenizer, and turns that end.

A fine-tuned model that does not end its turns talks on forever, whatever its loss: so the share of turns at whose end
the end-of-turn token has the largest logit is measured too.
By position: the mean loss of the targets with 1, 2–3, 4–7, 8–15, … tokens of context. A model that uses its context has
a lower loss where that is longer.
Balance of the experts (MaxVio, dead experts): a model may keep its loss on a text while the text's tokens crowd onto a
few experts.

Shapes: B rows, S tokens of a row, V vocabulary, K ranges of context.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from trinity.data.stream.collate import Batch, PackedSequence, collate, count_padding
from trinity.evaluation.expert_load import ValidationLoad, up_to_last_target
from trinity.models.trinity import Losses, Trinity
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
    masked: bool = False,
    end_of_turn: int | None = None,
    context: ContextParallel | None = None,
    by_position: bool = False,
    with_load: bool = False,
) -> dict[str, float]:
    """Mean cross-entropy of the valid targets over all ranks. Routing counts are dropped: expert biases do not change.

    Args:
        sequences: this rank's packed rows, the same number on every rank.
        microbatch: rows per forward pass.
        byte_lengths_V: [V] bytes of text per token; without it there are no bits per byte.
        beat: called after each forward pass.
        masked: most tokens have no target, so the head is computed for those that have one alone.
        end_of_turn: the token that ends a turn of the assistant; None: the ends of turns are not counted.
        context: the ranks that have the same rows as this one, and divide them by columns; None: no other has.
        by_position: also return the loss by the tokens' context: in the document with document_mask, else in the row.
        with_load: also return MaxVio and dead experts of the rows (expert_load.load_metrics).
    Returns:
        "loss", and "bits_per_byte": Σ CE / ln 2 / bytes of the targets. BOS, which begins the next document, is a
        target of 0 bytes, so its loss is spread over the text. "end_of_turn": the share of targets that end a turn
        whose logit is the largest. By position, "loss_at.C" for C = 1, 2, 4, …: the loss of the targets with C to
        2·C − 1 tokens of context.
    """
    ce, valid, text_bytes, turns, ended = 0.0, 0, 0, 0, 0
    by_context = LossByContext()
    load = ValidationLoad(model) if with_load else None
    for rows in _microbatches(sequences, microbatch):
        batch, kept_BS = _own_columns(rows, document_mask, context)
        forward = partial(_losses, model, batch, masked, context, device)
        losses = forward() if load is None else load.count(forward, kept_BS)
        ce += losses.ce_BS.double().sum().item()
        if by_position:
            by_context.add(losses.ce_BS, batch.targets_BS, _contexts(batch, rows, context))
        counted = batch.targets_BS[batch.targets_BS != IGNORE]
        valid += counted.numel()
        if byte_lengths_V is not None:
            text_bytes += int(byte_lengths_V[counted].sum())
        if end_of_turn is not None:
            is_end_BS = batch.targets_BS == end_of_turn
            turns += int(is_end_BS.sum())
            ended += int((_has_largest_logit(losses).cpu() & is_end_BS).sum())
        if beat is not None:
            beat()
    sums = torch.tensor([ce, valid, text_bytes, turns, ended], dtype=torch.float64)  # integers are exact to 2⁵³
    metrics = _means(sums, byte_lengths_V is not None, end_of_turn is not None)
    return metrics | (by_context.means() if by_position else {}) | ({} if load is None else load.metrics())


def _own_columns(
    rows: list[PackedSequence], document_mask: bool, context: ContextParallel | None
) -> tuple[Batch, Tensor]:
    """This rank's columns of some rows; and [B, S] bool, which of them do not come after the last target of the row."""
    batch = collate(rows, len(rows[0].tokens))
    if not document_mask:
        batch.document_ids_BS = None
    kept_BS = up_to_last_target(batch.targets_BS)
    if context is None:
        return batch, kept_BS
    columns = context.columns(batch.tokens_BS.shape[1])
    return batch.columns(columns), kept_BS[:, columns]


def _means(sums: Tensor, with_bytes: bool, with_turns: bool) -> dict[str, float]:
    """The metrics of all ranks from each rank's CE, targets, bytes, turns, and turns that end; see evaluate."""
    if dist.is_initialized():
        dist.all_reduce(sums)
    ce, valid, text_bytes, turns, ended = sums.tolist()
    metrics = {"loss": ce / max(valid, 1)}
    if with_bytes:
        metrics["bits_per_byte"] = ce / math.log(2) / max(text_bytes, 1)
    if with_turns:
        metrics["end_of_turn"] = ended / max(turns, 1)
    return metrics


def _contexts(batch: Batch, rows: list[PackedSequence], context: ContextParallel | None) -> Tensor:
    """context_lengths of the batch's columns of the rows."""
    row_ids_BS = batch.document_ids_BS if batch.row_document_ids_BS is None else batch.row_document_ids_BS
    lengths_BS = context_lengths(torch.Size((len(rows), len(rows[0].tokens))), row_ids_BS)
    return lengths_BS if context is None else lengths_BS[:, context.columns(lengths_BS.shape[1])]


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


def _losses(
    model: Trinity, batch: Batch, masked: bool, context: ContextParallel | None, device: torch.device
) -> Losses:
    """The losses of a microbatch, of this rank's columns."""
    (own,) = batch.microbatches(len(batch.tokens_BS), device)
    return model(
        own.tokens_BS,
        document_ids_BS=own.document_ids_BS,
        targets_BS=own.targets_BS,
        documents=own.documents,
        with_sequence_loss=False,
        padding=int(count_padding(batch).sum()),
        trained=int((batch.targets_BS != IGNORE).sum()) if masked else None,
        parts=row_parts(context, own.tokens_BS, own.row_document_ids_BS, own.documents, model.attention_engine),
    )


def _has_largest_logit(losses: Losses) -> Tensor:
    """[B, S] bool: whether a token's target has its largest logit.

    CE = (largest − the target's) + log Σ exp(logit − largest), and lse = largest + the same logarithm: so the first
    difference is 0 where largest + CE rounds to lse. A logit within the rounding of lse counts as the largest.
    """
    return losses.top_BS + losses.ce_BS == losses.lse_BS


def _microbatches(sequences: Iterable[PackedSequence], size: int) -> Iterator[list[PackedSequence]]:
    group: list[PackedSequence] = []
    for sequence in sequences:
        group.append(sequence)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
