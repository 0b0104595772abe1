"""Loss and bits per byte of packed rows, against a count without rows or token lengths."""

import copy
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trinity.config import RunConfig
from trinity.data.sources.shards import TokenSource
from trinity.data.stream.collate import PADDING_ID, PackedSequence
from trinity.data.stream.validation import validation_sequences
from trinity.data.tokenizer.tokenizer import load_tokenizer, token_byte_lengths
from trinity.evaluation.perplexity import open_documents
from trinity.evaluation.validation_loss import LossByContext, _has_largest_logit, context_lengths, evaluate
from trinity.models import Trinity
from trinity_kernels.cross_entropy import IGNORE


@pytest.mark.parametrize("loss_on_document_start", [True, False])
def test_bits_per_byte(
    exact: Trinity, config: RunConfig, corpus: SimpleNamespace, loss_on_document_start: bool
) -> None:
    """Nats from all logits in float64, over the bytes of the file's texts: every byte is a target once."""
    source, tokenizer = TokenSource(corpus.folder / "held_out"), Path(config.data.tokenizer)
    rows = list(validation_sequences(source, 200, 1000, loss_on_document_start))
    beats = []
    metrics = evaluate(
        exact,
        rows,
        3,
        document_mask=True,
        byte_lengths_V=token_byte_lengths(load_tokenizer(tokenizer)),
        device=torch.device("cpu"),
        beat=lambda: beats.append(1),
    )
    assert len(beats) == -(-len(rows) // 3)
    nats, targets = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logs_SV = exact(row.tokens[None], document_ids_BS=row.document_ids[None])[0].log_softmax(dim=-1)
        for place in (row.targets >= 0).nonzero().flatten().tolist():
            nats -= logs_SV[place, row.targets[place]].item()
            targets += 1
    texts = [json.loads(line)["text"] for line in corpus.texts["held_out"].read_text().splitlines()]
    assert abs(metrics["loss"] - nats / targets) < 1e-10
    assert abs(metrics["bits_per_byte"] - nats / math.log(2) / sum(len(text.encode()) for text in texts)) < 1e-10


def test_bytes_are_those_of_the_targets(exact: Trinity, config: RunConfig, tmp_path: Path) -> None:
    """One row of a longer text: the byte count is that of the targets, not that of the inputs."""
    (tmp_path / "text.txt").write_text("The loss of a step is a mean over the valid targets of its global batch.")
    tok = load_tokenizer(Path(config.data.tokenizer))
    source = open_documents(str(tmp_path / "text.txt"), Path(config.data.tokenizer), "text", 512)
    (row,) = validation_sequences(source, 10, 1)
    metrics = evaluate(exact, [row], 1, False, token_byte_lengths(tok), torch.device("cpu"))
    text = tok.decode(row.targets.tolist())
    assert len(text) > 10
    assert abs(metrics["bits_per_byte"] * len(text) - metrics["loss"] * 10 / math.log(2)) < 1e-10


def fine_tuning_rows(source: TokenSource, end: int) -> list[PackedSequence]:
    """Rows of whole documents and padding; a third of the tokens are targets, `end` among them, and some are wrong."""
    rows = []
    for document in range(12):
        tokens_S = source.read(document, 0, min(20, source.length(document))).astype(np.int32)
        values_3S = np.full((3, 24), IGNORE, np.int32)
        values_3S[0], values_3S[2] = source.bos_id, PADDING_ID
        values_3S[0, : len(tokens_S)], values_3S[2, : len(tokens_S)] = tokens_S, 0
        values_3S[1, 1 : len(tokens_S) : 3] = np.append(tokens_S[2::3], end)[: len(range(1, len(tokens_S), 3))]
        values_3S[1, len(tokens_S) - 1] = end
        rows.append(PackedSequence(values_3S, []))
    return rows


@pytest.mark.parametrize("masked", [False, True])
def test_turns_that_end(exact: Trinity, corpus: SimpleNamespace, masked: bool) -> None:
    """Nats per trained token, and the share of end-of-turn targets with the largest logit, from all logits.

    The end of turn is the token that the model predicts most often where rows end, so that some turns end and some do
    not.
    """
    rows = fine_tuning_rows(TokenSource(corpus.folder / "held_out"), 0)
    with torch.no_grad():
        logits_NSV = [exact(row.tokens[None], document_ids_BS=row.document_ids[None])[0] for row in rows]
    last_N = [int((row.document_ids >= 0).sum()) - 1 for row in rows]
    (end, times), *_ = Counter(logits[last].argmax().item() for logits, last in zip(logits_NSV, last_N)).most_common()
    assert 0 < times < len(rows)
    rows = fine_tuning_rows(TokenSource(corpus.folder / "held_out"), end)
    nats, targets, turns, ended = 0.0, 0, 0, 0
    for row, logits_SV in zip(rows, logits_NSV):
        for place in (row.targets != IGNORE).nonzero().flatten().tolist():
            target = row.targets[place].item()
            nats -= logits_SV[place].log_softmax(dim=-1)[target].item()
            targets += 1
            turns += target == end
            ended += target == end and logits_SV[place].argmax().item() == end
    assert times <= ended < turns
    metrics = evaluate(exact, rows, 5, True, None, torch.device("cpu"), masked=masked, end_of_turn=end)
    assert abs(metrics["loss"] - nats / targets) < 1e-10
    assert metrics["end_of_turn"] == ended / turns


@torch.no_grad()
def test_the_largest_logit_in_fp32(exact: Trinity) -> None:
    """Of random targets and of argmax targets, told from values per token alone; no target is within the rounding."""
    model = copy.deepcopy(exact).float()
    tokens_BS = torch.randint(100, (4, 50), generator=torch.Generator().manual_seed(0))
    best_BS = model(tokens_BS).argmax(dim=-1)
    targets_BS = best_BS.where(torch.rand(4, 50, generator=torch.Generator().manual_seed(1)) < 0.5, tokens_BS)
    found_BS = _has_largest_logit(model(tokens_BS, targets_BS=targets_BS))
    assert torch.equal(found_BS, targets_BS == best_BS)


@pytest.mark.parametrize("document_mask", [True, False])
def test_by_position(exact: Trinity, config: RunConfig, corpus: SimpleNamespace, document_mask: bool) -> None:
    """Each range's mean against a loop over tokens, in float64; the ranges together are the loss."""
    rows = list(validation_sequences(TokenSource(corpus.folder / "held_out"), 70, 9))
    metrics = evaluate(exact, rows, 4, document_mask, None, torch.device("cpu"), by_position=True)
    losses: dict[int, list[float]] = {}
    for row in rows:
        ids = row.document_ids[None] if document_mask else None
        with torch.no_grad():
            logs_SV = exact(row.tokens[None], document_ids_BS=ids)[0].log_softmax(dim=-1)
        for place in (row.targets >= 0).nonzero().flatten().tolist():
            begin = row.document_ids.tolist().index(row.document_ids[place]) if document_mask else 0
            context = place - begin + 1
            losses.setdefault(2 ** (context.bit_length() - 1), []).append(-logs_SV[place, row.targets[place]].item())
    assert {key for key in metrics if key.startswith("loss_at.")} == {f"loss_at.{context}" for context in losses}
    for context, values in losses.items():
        assert abs(metrics[f"loss_at.{context}"] - sum(values) / len(values)) < 1e-10
    assert abs(metrics["loss"] - sum(map(sum, losses.values())) / sum(map(len, losses.values()))) < 1e-10
    assert max(losses) == 64 or document_mask


def test_ranges_of_context() -> None:
    """Powers of two begin a range, up to lengths beyond any row."""
    contexts = [1, 2, 3, 4, 7, 8, 2**20 - 1, 2**20, 2**40 - 1, 2**40]
    by_context = LossByContext()
    ce_BS = torch.arange(10.0)[None]
    by_context.add(ce_BS, torch.zeros(1, 10, dtype=torch.int64), torch.tensor([contexts]))
    assert by_context.means() == {
        "loss_at.1": 0, "loss_at.2": 1.5, "loss_at.4": 3.5, "loss_at.8": 5, f"loss_at.{2**19}": 6,
        f"loss_at.{2**20}": 7, f"loss_at.{2**39}": 8, f"loss_at.{2**40}": 9,
    }  # fmt: skip
    ids_BS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 3]])
    assert context_lengths(ids_BS.shape, ids_BS).tolist() == [[1, 2, 1, 2, 3], [1, 1, 1, 2, 1]]
    assert context_lengths(ids_BS.shape, None).tolist() == [[1, 2, 3, 4, 5]] * 2
