"""The attention probe against its definition written out in float64, and against a run without it.

Bounds: both sides compute in float64, whose rounding is 1e-16; a product of some ten terms leaves 1e-13.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.training.run_files import metrics, state, train
from trinity.config.load import OmegaConf, build_config
from trinity.config.run import ParallelConfig
from trinity.models import ZOO, attention
from trinity.models.attention_backends import AttentionMask, Keys, attend
from trinity.monitor.attention_probe import QUERIES, largest_logit, probe_attention
from trinity.parallel import mesh
from trinity.training.build import build_model
from trinity.training.build_data import open_data


@pytest.fixture
def ranks() -> Iterator[mesh.Ranks]:
    """This process as a mesh of one."""
    yield mesh.start(ParallelConfig(), ZOO["smoke"], 1, False)
    mesh.stop()


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("length", [24, 200])
def test_the_largest_logit(window: int | None, documents: bool, length: int) -> None:
    """Against all logits of the sampled queries under attention's mask; masked logits are larger and must not count."""
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(1, length, 4, 8, generator=generator, dtype=torch.float64)
    k = torch.randn(1, length, 2, 8, generator=generator, dtype=torch.float64)
    k[:, -1] *= 10  # which only the last query may see, and that has no say
    q[:, -1] = 0
    ids = torch.arange(length).unsqueeze(0) // 7 if documents else None
    rule = AttentionMask(torch.arange(length).unsqueeze(0), ids)
    mask = rule.dense(window)[0, 0]
    places = [round(i * (length - 1) / (min(QUERIES, length) - 1)) for i in range(min(QUERIES, length))]
    expected, hidden = -math.inf, -math.inf
    for head in range(4):
        logits = q[0, :, head] @ k[0, :, head // 2].t() / math.sqrt(8)
        expected = max(expected, logits[places].masked_fill(~mask[places], -math.inf).max().item())
        hidden = max(hidden, logits[places].max().item())
    assert largest_logit(q, k, window, rule).item() == pytest.approx(expected, abs=1e-13)
    assert hidden > expected + 0.1
    parts = []
    for start in range(0, length, 2):  # chunks of queries with the keys up to them; of 200, some have no sampled query
        own, before = slice(start, start + 2), slice(0, start + 2)
        keys = Keys(rule.positions_BS[:, before], None if ids is None else ids[:, before])
        part = AttentionMask(rule.positions_BS[:, own], None if ids is None else ids[:, own], keys=keys)
        parts.append(largest_logit(q[:, own], k[:, before], window, part, length).item())
    assert max(parts) == pytest.approx(expected, abs=1e-13)
    assert (-math.inf in parts) == (length == 200)


@pytest.mark.parametrize("words", [[], ["recompute=block"], ["compile=block"]])
def test_the_probe_of_a_model(settings: dict, ranks: mesh.Ranks, words: list[str]) -> None:
    """Queries and keys as attention receives them, in any wrapper of the blocks; all 24 of a row are sampled."""
    words = [*words, "precision.compute=float64", "optim.muon.dtype=float64"]
    config = build_config([("test", OmegaConf.create(settings)), ("test", OmegaConf.from_dotlist(words))])
    model = build_model(config, ranks)
    model.init_weights(1)
    rows = open_data(config, ranks).loader.take(2)
    logits: list[float] = []

    def noted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, visible: AttentionMask) -> object:
        scores = (
            torch.einsum("bshc,bthc->bhst", q, k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)) / q.shape[3] ** 0.5
        )
        logits.append(scores.masked_fill(~visible.dense(window), -math.inf).max().item())
        return attend(q, k, v, window, visible)

    before = hooks_of(model)
    with mock.patch.object(attention, "attend", noted):
        result = probe_attention(model, rows.tokens_BS, rows.targets_BS, rows.document_ids_BS, ranks)
    assert len(logits) == config.model.layers
    assert result.max_logit == pytest.approx(max(logits), abs=1e-13)
    assert len(result.seconds_R) == 1
    assert hooks_of(model) == before


def hooks_of(model: torch.nn.Module) -> int:
    """Number of hooks in a model; FSDP has some of its own."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_probe_changes_nothing(settings: dict, uninterrupted: Path) -> None:
    """A probe at every step, against a run with one at step 1: the same metrics and the same state, bit for bit."""
    assert train(settings, "log.probe_every=1") == 0
    run = Path(settings["run"]["dir"])
    lines = metrics(run)
    assert all(isinstance(line.pop("max_attention_logit"), float) for line in lines)
    expected = metrics(uninterrupted)
    assert "max_attention_logit" in expected[0]
    assert lines == [{key: value for key, value in line.items() if key != "max_attention_logit"} for line in expected]
    before, after = state(uninterrupted, 8), state(run, 8)
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_entropy_of_each_router(settings: dict) -> None:
    """The mean over the layers is the step's router_entropy."""
    assert train(settings, "run.steps=2", "log.router_every=1") == 0
    run = Path(settings["run"]["dir"])
    lines = [json.loads(line) for line in (run / "router.jsonl").read_text().splitlines()]
    for line, record in zip(lines, metrics(run), strict=True):
        assert len(line["entropy"]) == len(set(line["entropy"])) == 2
        assert sum(line["entropy"]) / 2 == pytest.approx(record["router_entropy"], rel=1e-14)
