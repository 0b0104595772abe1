"""Each token is scored once, in the window of the definition; packed perplexity equals the run's validation loss.

Shapes: S tokens, V vocabulary.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trinity.config import RunConfig
from trinity.data.sources.shards import TokenSource
from trinity.data.tokenizer.tokenizer import load_text_encoder, load_tokenizer, token_byte_lengths
from trinity.errors import UserError
from trinity.evaluation.perplexity import ContextWindow, open_documents, packed_perplexity, perplexity, sliding_windows
from trinity.interop import load_hf
from trinity.models import Trinity

DOCUMENTS = 3


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 9, 10, 11, 23])
@pytest.mark.parametrize(
    "window", [ContextWindow(4, 4), ContextWindow(4, 1), ContextWindow(5, 3), ContextWindow(50, 20)]
)
def test_sliding_windows(length: int, window: ContextWindow) -> None:
    """Every token but the first is scored once, in order, after at least W − stride tokens if the text has them."""
    tokens, scored = list(range(100, 100 + length)), []
    for span in sliding_windows(tokens, window):
        assert 1 <= span.start < len(span.tokens) <= window.length + 1
        before = span.tokens[0] - 100
        assert span.start >= min(before + span.start, window.length - window.stride)
        scored += span.tokens[span.start :]
    assert scored == tokens[1:]


def test_perplexity_equals_the_definition(exact: Trinity, config: RunConfig) -> None:
    """Documents of real text, longer than the window, in float64, against a loop over tokens.

    A token's window is counted by hand: the first has 12 targets, each later one four.
    """
    source = TokenSource(config.data.validation["held_out"])
    byte_lengths_V = token_byte_lengths(load_tokenizer(Path(config.data.tokenizer)))
    nats, tokens, text = 0.0, 0, 0
    by_context: dict[int, list[float]] = {}
    for document in range(DOCUMENTS):
        ids = source.read(document, 0, source.length(document)).astype(int).tolist()
        for place in range(1, len(ids)):
            end = 13 if place < 13 else min(13 + 4 * math.ceil((place - 12) / 4), len(ids))
            context = ids[max(0, min(end, len(ids)) - 13) : place]
            with torch.no_grad():
                logits_V = exact(torch.tensor([context]))[0, -1]
            loss = -torch.log_softmax(logits_V, dim=-1)[ids[place]].item()
            by_context.setdefault(2 ** (len(context).bit_length() - 1), []).append(loss)
            nats += loss
            tokens += 1
        text += len(load_text_encoder(Path(config.data.tokenizer)).decode(ids[1:]).encode())
    metrics = perplexity(
        exact,
        source,
        ContextWindow(12, 4),
        byte_lengths_V=byte_lengths_V,
        documents=DOCUMENTS,
        batch_tokens=100,
        by_position=True,
    )
    assert (metrics["tokens"], metrics["documents"], metrics["bytes"]) == (tokens, DOCUMENTS, text)
    assert sorted(by_context) == [1, 2, 4, 8]
    for context, losses in by_context.items():
        assert abs(metrics[f"loss_at.{context}"] - sum(losses) / len(losses)) < 1e-10
    assert abs(metrics["loss"] - nats / tokens) < 1e-10
    assert abs(metrics["bits_per_byte"] - nats / math.log(2) / text) < 1e-10
    assert abs(metrics["perplexity"] - math.exp(nats / tokens)) < 1e-7


def test_packed_perplexity_equals_the_run_s_validation_loss(finished: SimpleNamespace) -> None:
    """The exported folder on the same rows. Both in fp32: another batch size changes the order of sums."""
    config, folder = finished.config, finished.folder
    byte_lengths_V = token_byte_lengths(load_tokenizer(folder))
    source = open_documents(config.data.validation["held_out"], folder, "text", config.model.vocab_size)
    metrics = packed_perplexity(
        load_hf(folder),
        source,
        config.data.sequence_length,
        byte_lengths_V=byte_lengths_V,
        rows=config.evaluation.sequences,
        document_mask=config.data.document_mask,
        loss_on_document_start=config.data.loss_on_document_start,
    )
    assert abs(metrics["loss"] - finished.last["validation_loss.held_out"]) < 1e-5
    assert abs(metrics["bits_per_byte"] - finished.last["validation_bits_per_byte.held_out"]) < 1e-5


def test_sliding_equals_packed_for_masked_whole_documents(exact: Trinity, config: RunConfig, tmp_path: Path) -> None:
    """Under a document mask, with the same documents whole in both, sliding and packing must agree."""
    lines = ["the model", "reads text", "in a row"]
    path = tmp_path / "short.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    tokenizer = Path(config.data.tokenizer)
    source, lengths_V = open_documents(str(path), tokenizer, "text", 512), token_byte_lengths(load_tokenizer(tokenizer))
    sliding = perplexity(exact, source, ContextWindow(64, 32), byte_lengths_V=lengths_V)
    packed = packed_perplexity(
        exact, source, 64, byte_lengths_V=lengths_V, document_mask=True, loss_on_document_start=False
    )
    assert sliding["bytes"] == sum(len(line) for line in lines)
    assert abs(sliding["loss"] - packed["loss"]) < 1e-10
    assert abs(sliding["bits_per_byte"] - packed["bits_per_byte"]) < 1e-10


def test_shards_of_another_tokenizer(finished: SimpleNamespace, tmp_path: Path) -> None:
    other = (finished.folder / "tokenizer.json").read_text() + " "
    (tmp_path / "tokenizer.json").write_text(other)
    place = finished.config.data.validation["held_out"]
    with pytest.raises(UserError, match="was made with another tokenizer"):
        open_documents(place, tmp_path, "text", 512)
    with pytest.raises(UserError, match="token ids up to 399, and the model 300 rows"):
        open_documents(place, finished.folder, "text", 300)
