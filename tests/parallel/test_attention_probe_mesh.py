"""Attention probe over several processes: the max logit equals that of one process, and a straggler is named."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from tests.parallel.mesh_runs import config_of
from trinity.models.attention import AttentionCore
from trinity.parallel import mesh
from trinity.training.trainer import pretrain

WORDS = [
    "batch.sequences=4", "batch.ramp=[]", "run.steps=3", "evaluation.every=0", "log.probe_every=1",
    "optim.muon.dtype=float64", "precision.compute=float64", "precision.reduce=float64",
]  # fmt: skip


def run(settings: dict, words: list[str], slow: int | None = None) -> int:
    """Exit code of a run in which attention takes 20 ms more on rank `slow`."""
    forward = AttentionCore.forward

    def slowly(self: AttentionCore, *args: object) -> object:
        if dist.get_rank() == slow:
            time.sleep(0.02)
        return forward(self, *args)

    with mock.patch.object(mesh, "stop"), mock.patch.object(AttentionCore, "forward", slowly):
        return pretrain(config_of(settings, [*WORDS, *words]), [])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("words", [["parallel.expert=2"], ["parallel.context=2"]])
def test_max_logit_and_straggler_of_two_ranks(
    recipe: Callable, processes: Callable, tmp_path: Path, words: list[str]
) -> None:
    """In float64, to 1e-10 (test_every_mesh): the first of four rows is probed, by both ranks if it is divided."""
    try:
        assert run(recipe(tmp_path / "one"), []) == 0
    finally:
        mesh.stop()
    assert processes(2).run(run, recipe(tmp_path / "two"), words, 1) == [0, 0]
    one, two = lines(tmp_path / "one/metrics.jsonl"), lines(tmp_path / "two/metrics.jsonl")
    for alone, both in zip(one, two, strict=True):
        assert both["max_attention_logit"] == pytest.approx(alone["max_attention_logit"], abs=1e-10)
        assert both["loss"] == pytest.approx(alone["loss"], abs=1e-10)
        assert both["rank_seconds_spread"] > 0.5  # or there would be no warning
    (event,) = [event for event in lines(tmp_path / "two/events.jsonl") if event["kind"] == "slow_rank"]
    assert (event["rank"], event["slow_rank"], event["step"]) == (0, 1, 3)
