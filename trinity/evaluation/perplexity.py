"""Perplexity of documents in a sliding window: nats per token and bits per byte, each document by itself.

A window of W tokens moves by `stride` tokens. The first window scores all of its tokens but the document's first; every
later one scores the `stride` new tokens at its end. So each token is scored once, with at least W − stride tokens of
context if the document has them. stride = W is fastest and gives the least context.

A run's validation loss is a different measure: it packs documents into rows. See packed_perplexity.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.data.sources.inputs import holds_text
from trinity.data.sources.shards import TokenSource
from trinity.data.sources.source import Source
from trinity.data.sources.text import TextSource
from trinity.data.stream.validation import validation_sequences
from trinity.data.tokenizer.tokenizer import fingerprint
from trinity.errors import UserError
from trinity.evaluation.scoring import Span, token_losses
from trinity.evaluation.validation_loss import LossByContext, context_lengths, evaluate
from trinity.io.remote import local_or_url
from trinity.models.trinity import Trinity
from trinity.terminal import Progress

GROUP_TOKENS = 1 << 20
"""Tokens of documents that are sorted by length and batched together: enough to fill batches, few enough to hold."""


class ContextWindow(NamedTuple):
    """length: W, most tokens of context. stride: tokens by which the window moves, 1 to W."""

    length: int
    stride: int


def open_documents(
    path: str, tokenizer: Path, field: str, vocab_size: int, kind: str | None = None, option: str = "--text"
) -> TokenSource | TextSource:
    """Open documents to measure: token shards, or text, which is tokenised.

    Args:
        path: folder or URL of token shards; or a file, folder or pattern of text.
        tokenizer: folder of the model's tokenizer.
        field: name of the text in a JSON line or Parquet row.
        vocab_size: V of the model.
        kind: kind of files to read from a folder or pattern with several kinds (see expand_inputs).
        option: the option that gives the path, for messages.
    Raises:
        UserError: there is nothing to read, or the shards were made with another tokenizer.
    """
    source: TokenSource | TextSource
    local = local_or_url(path)
    missing = isinstance(local, Path) and not local.exists()  # TextSource reports it
    if missing or holds_text(path):
        source = TextSource([path], tokenizer, field=field, kind=kind, option=option, progress=True)
    else:
        source = TokenSource(path)
    if source.tokenizer_fingerprint != fingerprint(tokenizer):
        raise UserError(f"{option} {path} was made with another tokenizer than {tokenizer}; prepare it with that one")
    if source.vocab_size > vocab_size:
        raise UserError(f"{tokenizer} has token ids up to {source.vocab_size - 1}, and the model {vocab_size} rows")
    return source


def perplexity(
    model: Trinity,
    source: Source,
    window: ContextWindow,
    *,
    byte_lengths_V: Tensor | None,
    documents: int | None = None,
    batch_tokens: int = 8192,
    by_position: bool = False,
) -> dict[str, float]:
    """Perplexity of a source's documents, each by itself.

    Args:
        model: on any device, not sharded.
        source: documents that begin with BOS, which is context and not scored.
        window: the sliding window.
        byte_lengths_V: [V] bytes of text per token; without it there are no bits per byte.
        documents: measure only this many, from the first. Default: all.
        batch_tokens: most tokens in one forward pass.
        by_position: also the loss by the tokens' context, in the window.
    Returns:
        "loss" in nats per token, "perplexity", "tokens" (scored), "documents", and "bits_per_byte" with "bytes", those
        of the whole text: every token of it is scored; and "loss_at.C" (see validation_loss.evaluate) by position.
    """
    count = min(source.documents, source.documents if documents is None else documents)
    nats, tokens, text_bytes, done = 0.0, 0, 0, 0
    by_context = LossByContext()
    with Progress("perplexity", count, "document") as progress:
        for group in _groups(source, count):
            spans = [span for ids in group for span in sliding_windows(ids.tolist(), window)]
            scores: list[float] = []
            for _, ce_NS, targets_NS in token_losses(model, spans, batch_tokens):
                scores += (-ce_NS.double().sum(dim=1)).tolist()
                if by_position:
                    by_context.add(ce_NS, targets_NS, context_lengths(targets_NS.shape, None))
                progress.update_to(done + len(group) * len(scores) // len(spans))
            nats -= math.fsum(scores)
            tokens += sum(len(span.tokens) - span.start for span in spans)
            if byte_lengths_V is not None:
                text_bytes += sum(int(byte_lengths_V[ids[1:]].sum()) for ids in group)
            done += len(group)
            progress.update_to(done)
    loss = nats / max(tokens, 1)
    metrics = {"loss": loss, "tokens": tokens, "documents": count, "perplexity": _exp(loss)}
    if byte_lengths_V is not None:
        metrics |= {"bits_per_byte": nats / math.log(2) / max(text_bytes, 1), "bytes": text_bytes}
    return metrics | by_context.means()


def packed_perplexity(
    model: Trinity,
    source: Source,
    sequence_length: int,
    *,
    byte_lengths_V: Tensor | None,
    rows: int | None = None,
    document_mask: bool,
    loss_on_document_start: bool,
    best_fit_rows: int = 0,
    masked: bool | None = None,
    batch_tokens: int = 8192,
    by_position: bool = False,
) -> dict[str, float]:
    """A run's validation loss: on the same rows, and of shards with a loss mask on the same tokens.

    Args:
        sequence_length, rows, document_mask, loss_on_document_start: the run's data.sequence_length,
            evaluation.sequences (default: all rows), data.document_mask and data.loss_on_document_start.
        best_fit_rows: the run's data.best_fit_rows with data.packing=best_fit; 0: documents in file order.
        masked: count only tokens that the source's mask marks, as data.loss=masked does; None: if it has a mask.
        model, source, byte_lengths_V, batch_tokens, by_position: see `perplexity`.
    Returns:
        "loss", "perplexity", "bits_per_byte"; and "loss_at.C" by position.
    """
    masked = source.masked if masked is None else masked
    count = sys.maxsize if rows is None else rows
    sequences = validation_sequences(
        source, sequence_length, count, loss_on_document_start, best_fit_rows=best_fit_rows, masked=masked
    )
    sequences = Progress("perplexity", rows, "row").over(sequences)
    microbatch = max(1, batch_tokens // sequence_length)
    device = model.embed.weight.device
    metrics = evaluate(
        model, sequences, microbatch, document_mask, byte_lengths_V, device, masked=masked, by_position=by_position
    )
    return metrics | {"perplexity": _exp(metrics["loss"])}


def sliding_windows(tokens: list[int], window: ContextWindow) -> Iterator[Span]:
    """The spans of a document of n tokens, in order: each of the n − 1 targets is scored in exactly one.

    A span has one token more than the window: its last token is only a target.
    """
    scored = 1  # the tokens before this index are BOS or already scored
    end = min(window.length + 1, len(tokens))
    while scored < len(tokens):
        begin = max(0, end - window.length - 1)
        yield Span(tokens[begin:end], scored - begin)
        scored, end = end, min(end + window.stride, len(tokens))


def _groups(source: Source, documents: int) -> Iterator[list[Tensor]]:
    """The token ids of the first `documents` documents, in groups of about GROUP_TOKENS tokens."""
    numbers = iter(range(documents))
    while True:
        group: list[Tensor] = []
        tokens = 0
        for document in numbers:
            length = source.length(document)
            group.append(torch.from_numpy(source.read(document, 0, length).astype("int64")))
            tokens += length
            if tokens >= GROUP_TOKENS:
                break
        if not group:
            return
        yield group


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # e⁷⁰⁹ is the largest float
