"""A continued model on four processes: its validation sets' balance equals counts of the router's choices, its losses
and forgetting those of one process."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.parallel.mesh_runs import BOUND
from tests.parallel.saving_runs import on_ranks, plain_run
from tests.training.expert_counts import count_choices, expected_metrics
from trinity.interop import export_hf, load_hf
from trinity.training.load_run import load_model

WORDS = [
    "precision.compute=float64", "precision.reduce=float64", "optim.muon.dtype=float64", "batch.sequences=4",
    "batch.ramp=[]", "run.steps=2", "evaluation.every=1", "evaluation.sequences=7", "checkpoint.every=0",
    "health.forgetting={held_out: 9}",
]  # fmt: skip
"""Seven rows do not divide by four ranks: one gets a row without targets."""
MESHES = {
    "one": (1, []),
    "experts": (4, ["parallel.shard=4", "parallel.expert=2"]),
    "context": (4, ["parallel.shard=2", "parallel.context=2"]),
}


@pytest.fixture(scope="module")
def lines(
    recipe: Callable, processes: Callable, uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """metrics.jsonl of each mesh, and the folder that the runs start from."""
    folder = tmp_path_factory.mktemp("continued")
    model, config, _ = load_model(uninterrupted)
    origin = export_hf(model, folder / "hf", Path(config.data.tokenizer), torch.float32)
    found = {}
    for name, (world, words) in MESHES.items():
        settings = recipe(folder / name)
        assert on_ranks(processes, world, plain_run, settings, [*WORDS, f"init.hf={origin}", *words]) == [0] * world
        found[name] = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return SimpleNamespace(origin=origin, shards=Path(settings["data"]["validation"]["held_out"]), by_mesh=found)


@pytest.mark.parametrize("mesh", MESHES)
def test_balance_is_that_of_the_choices(lines: SimpleNamespace, mesh: str) -> None:
    """At step 0, in float64, exactly: the padding of no rank is counted, and each token once."""
    counts_ME = count_choices(load_hf(lines.origin).double(), lines.shards, 24, 7, False)
    expected = expected_metrics(counts_ME, "held_out")
    first = lines.by_mesh[mesh][0]
    assert first["step"] == 0
    assert {name: first[name] for name in expected} == expected


@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "one"])
def test_losses_are_those_of_one_process(lines: SimpleNamespace, mesh: str) -> None:
    """At all steps, within the bound of the mesh tests; the rise is a difference of two losses of about 6."""
    for line, expected in zip(lines.by_mesh[mesh], lines.by_mesh["one"], strict=True):
        fields = [name for name in expected if name.startswith("validation_")]
        assert len(fields) == 5
        assert {name: line[name] for name in fields} == pytest.approx(
            {name: expected[name] for name in fields}, rel=BOUND
        )
        assert line["forgetting.held_out"] == pytest.approx(expected["forgetting.held_out"], abs=10 * BOUND)
