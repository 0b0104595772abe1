"""Nats per token and bits per byte of documents, each alone, read through a window that slides over it.

A window of W tokens moves on by `stride`. The first scores all of its tokens but the document's beginning, every later
one only the `stride` new ones at its end: so each token is scored once, and has at least W − stride tokens before it
where the document has them. stride = W is fastest and gives tokens least to go by.

A run's own validation loss is another figure: it packs documents into rows. packed_perplexity makes that one.
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
from trinity.evaluation.scoring import Span, log_likelihoods
from trinity.evaluation.validation_loss import evaluate
from trinity.io.remote import located
from trinity.models.trinity import Trinity
from trinity.terminal import Progress

GROUP_TOKENS = 1 << 20
"""Tokens that are sorted by length and batched together: enough to fill batches, few enough to hold."""


class ContextWindow(NamedTuple):
    """length: W, tokens that the model sees at once. stride: how far it moves on, 1 to W."""

    length: int
    stride: int


def open_documents(
    place: str, tokenizer: Path, field: str, vocab_size: int, kind: str | None = None
) -> TokenSource | TextSource:
    """Documents to measure: a folder of token shards, or text, which is tokenised.

    Args:
        place: the folder or URL of shards; or a file, folder or pattern of texts.
        tokenizer: folder of the model's tokenizer.
        field: name of the text in a JSON line or Parquet row.
        vocab_size: V of the model.
        kind: of files in folders and of patterns, if they are mixed (see expand_inputs).
    Raises:
        UserError: nothing to read there, or shards of another tokenizer.
    """
    source: TokenSource | TextSource
    where = located(place)
    missing = isinstance(where, Path) and not where.exists()  # said so by whoever opens texts
    if missing or holds_text(place):
        source = TextSource([place], tokenizer, field=field, kind=kind, option="--text", progress=True)
    else:
        source = TokenSource(place)
    if source.tokenizer_fingerprint != fingerprint(tokenizer):
        raise UserError(f"--text {place} was made with another tokenizer than {tokenizer}; prepare it with that one")
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
) -> dict[str, float]:
    """How well the model foretells a source's documents, each by itself.

    Args:
        model: on any device, not sharded.
        source: documents that begin with BOS, which is given and not scored.
        window: what the model sees.
        byte_lengths_V: [V] bytes of text per token; without it there are no bits per byte.
        documents: only so many, the first ones.
        batch_tokens: tokens of one forward pass, at most.
    Returns:
        "loss" in nats per token, "perplexity", "tokens" that were scored, "documents", and "bits_per_byte" with
        "bytes": all of the text, since nothing of it is left unscored.
    """
    wanted = min(source.documents, source.documents if documents is None else documents)
    nats, tokens, text_bytes, measured = 0.0, 0, 0, 0
    with Progress("perplexity", wanted, "document") as progress:
        for group in _groups(source, wanted):
            spans = [span for ids in group for span in windows(ids.tolist(), window)]
            scores = []
            for _, score in log_likelihoods(model, spans, batch_tokens):
                scores.append(score)
                progress.update_to(measured + len(group) * len(scores) // len(spans))
            nats -= math.fsum(scores)
            tokens += sum(len(span.tokens) - span.start for span in spans)
            if byte_lengths_V is not None:
                text_bytes += sum(int(byte_lengths_V[ids[1:]].sum()) for ids in group)
            measured += len(group)
            progress.update_to(measured)
    figures = {"loss": nats / max(tokens, 1), "tokens": tokens, "documents": wanted}
    return _whole(figures, nats, text_bytes if byte_lengths_V is not None else None)


def packed_perplexity(
    model: Trinity,
    source: Source,
    sequence_length: int,
    *,
    byte_lengths_V: Tensor | None,
    rows: int | None = None,
    document_mask: bool,
    loss_on_document_start: bool,
    batch_tokens: int = 8192,
) -> dict[str, float]:
    """A run's validation loss: the same rows, documents packed one after the other.

    Args:
        sequence_length, rows, document_mask, loss_on_document_start: the run's data.sequence_length,
            evaluation.sequences (all there are by default), data.document_mask and data.loss_on_document_start.
        others: see `perplexity`.
    Returns:
        "loss", "perplexity", and "bits_per_byte".
    """
    sequences = validation_sequences(
        source, sequence_length, sys.maxsize if rows is None else rows, loss_on_document_start
    )
    shown = Progress("perplexity", rows, "row").over(sequences)
    microbatch = max(1, batch_tokens // sequence_length)
    figures = evaluate(model, shown, microbatch, document_mask, byte_lengths_V, model.embed.weight.device)
    return figures | {"perplexity": _exp(figures["loss"])}


def windows(tokens: list[int], window: ContextWindow) -> Iterator[Span]:
    """What is scored of a document of n tokens, in order: n − 1 targets, each in one span.

    A span holds one token more than the model sees: the last one is only foretold.
    """
    scored = 1  # tokens before this one have been scored, or are BOS
    end = min(window.length + 1, len(tokens))
    while scored < len(tokens):
        begin = max(0, end - window.length - 1)
        yield Span(tokens[begin:end], scored - begin)
        scored, end = end, min(end + window.stride, len(tokens))


def _groups(source: Source, documents: int) -> Iterator[list[Tensor]]:
    """The documents' ids, a million tokens or so at a time."""
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


def _whole(figures: dict[str, float], nats: float, text_bytes: int | None) -> dict[str, float]:
    figures["perplexity"] = _exp(figures["loss"])
    if text_bytes is not None:
        figures |= {"bits_per_byte": nats / math.log(2) / max(text_bytes, 1), "bytes": text_bytes}
    return figures


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # e⁷⁰⁹ is the largest float
