"""Samples and profiles of several processes: the samples equal those of one process."""

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
    """Exit code of a run of the config."""
    with mock.patch.object(mesh, "stop"):
        return pretrain(config_of(settings, [*WORDS, *words]), [])


def samples(folder: Path) -> list[dict]:
    """The lines of samples.jsonl."""
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_samples_do_not_depend_on_the_mesh(recipe: Callable, processes: Callable, tmp_path: Path) -> None:
    """Experts, or rows, split over two ranks, in float64: the most likely tokens are the same.

    A prompt is not divided: every rank continues the whole of it, of any length.
    """
    try:
        assert run(recipe(tmp_path / "one"), []) == 0
    finally:
        mesh.stop()
    expected = samples(tmp_path / "one")
    assert [line["step"] for line in expected] == [1, 1]
    assert processes(2).run(run, recipe(tmp_path / "two"), ["parallel.expert=2"]) == [0, 0]
    assert samples(tmp_path / "two") == expected
    assert processes(2).run(run, recipe(tmp_path / "context"), ["parallel.context=2"]) == [0, 0]
    assert samples(tmp_path / "context") == expected


def test_only_the_configured_ranks_are_profiled(recipe: Callable, processes: Callable, tmp_path: Path) -> None:
    """Rank 1 of 2, and not rank 0."""
    words = ["evaluation.every=0", "profile.steps=1", "profile.ranks=[1]"]
    assert processes(2).run(run, recipe(tmp_path / "run"), words) == [0, 0]
    files = sorted(path.name for path in (tmp_path / "run/profile").iterdir())
    assert files == ["step_00000001.rank1.json.gz", "step_00000001.rank1.txt"]
