"""Samples and profiles of several processes: all continue the prompts together, and say what one process says."""

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from tests.parallel.mesh_runs import config_of
from trinity.parallel import mesh
from trinity.training.trainer import pretrain

WORDS = [
    "batch.sequences=4", "batch.ramp=[]", "run.steps=1", "evaluation.every=1", "evaluation.sequences=3",
    "evaluation.prompts=[def train, the run]", "evaluation.sample_tokens=6", "optim.muon.dtype=float64",
    "precision.compute=float64", "precision.reduce=float64",
]  # fmt: skip


def run(settings: dict, words: list[str]) -> int:
    """A run of the config; its code."""
    with mock.patch.object(mesh, "stop"):
        return pretrain(config_of(settings, [*WORDS, *words]), [])


def samples(folder: Path) -> list[dict]:
    """samples.jsonl."""
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_samples_do_not_depend_on_the_mesh(recipe: Callable, processes: Callable, tmp_path: Path) -> None:
    """Experts split over two ranks, in float64: the likeliest token stays the likeliest."""
    try:
        assert run(recipe(tmp_path / "one"), []) == 0
    finally:
        mesh.stop()
    expected = samples(tmp_path / "one")
    assert [line["step"] for line in expected] == [1, 1]
    assert processes(2).run(run, recipe(tmp_path / "two"), ["parallel.expert=2"]) == [0, 0]
    assert samples(tmp_path / "two") == expected


def test_ranks_that_are_asked_are_profiled(recipe: Callable, processes: Callable, tmp_path: Path) -> None:
    """Rank 1 of 2, and not the other."""
    words = ["evaluation.every=0", "profile.steps=1", "profile.ranks=[1]"]
    assert processes(2).run(run, recipe(tmp_path / "run"), words) == [0, 0]
    found = sorted(path.name for path in (tmp_path / "run/profile").iterdir())
    assert found == ["step_00000001.rank1.json.gz", "step_00000001.rank1.txt"]
