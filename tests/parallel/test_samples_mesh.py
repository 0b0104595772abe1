"""Samples, needles and profiles of several processes: samples and needles equal those of one process."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from tests.parallel.mesh_runs import config_of
from trinity.parallel import mesh
from trinity.training.trainer import pretrain

WORDS = [
    "batch.sequences=4", "batch.ramp=[]", "run.steps=1", "evaluation.every=1", "evaluation.sequences=3",
    "evaluation.prompts=[def train, the run]", "evaluation.sample_tokens=6", "optim.muon.dtype=float64",
    "precision.compute=float64", "precision.reduce=float64", "evaluation.by_position=true",
    "evaluation.needles={lengths: [480, 700], kinds: [2, 3], samples: 3}",
]  # fmt: skip


def run(settings: dict, words: list[str]) -> int:
    """Exit code of a run of the config."""
    with mock.patch.object(mesh, "stop"):
        return pretrain(config_of(settings, [*WORDS, *words]), [])


def lines(folder: Path, name: str = "samples") -> list[dict]:
    """The lines of samples.jsonl, or of another file."""
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_samples_do_not_depend_on_the_mesh(recipe: Callable, processes: Callable, tmp_path: Path) -> None:
    """Experts, or rows, split over two ranks, in float64: the most likely tokens are the same. Three samples of needles
    do not divide by two ranks; scores are equal, nats and the losses by position to 1e-10 of rounding.

    A prompt is not divided: every rank continues the whole of it, of any length.
    """
    try:
        assert run(recipe(tmp_path / "one"), []) == 0
    finally:
        mesh.stop()
    expected, needles = lines(tmp_path / "one"), lines(tmp_path / "one", "needles")
    (metrics,) = lines(tmp_path / "one", "metrics")
    assert [line["step"] for line in expected] == [1, 1]
    assert processes(2).run(run, recipe(tmp_path / "two"), ["parallel.expert=2"]) == [0, 0]
    meshes = {"two": "parallel.expert=2", "context": "parallel.context=2"}
    for name, word in meshes.items():
        assert processes(2).run(run, recipe(tmp_path / name), [word]) == [0, 0]
        assert lines(tmp_path / name) == expected
        of_two = lines(tmp_path / name, "needles")
        assert len(needles) == len(of_two) == 4
        for one, two in zip(needles, of_two):
            assert math.isclose(one["nats"], two["nats"], rel_tol=1e-10)
            assert one | {"nats": 0} == two | {"nats": 0}
        (metrics_of_two,) = lines(tmp_path / name, "metrics")
        fields = [field for field in metrics if field.startswith(("needle", "validation_loss_at."))]
        assert len(fields) > 8
        assert all(math.isclose(metrics[field], metrics_of_two[field], rel_tol=1e-10) for field in fields)


def test_only_the_configured_ranks_are_profiled(recipe: Callable, processes: Callable, tmp_path: Path) -> None:
    """Rank 1 of 2, and not rank 0."""
    words = [
        "evaluation.every=0",
        "evaluation.prompts=[]",
        "evaluation.needles.lengths=[]",
        "profile.steps=1",
        "profile.ranks=[1]",
    ]
    assert processes(2).run(run, recipe(tmp_path / "run"), words) == [0, 0]
    files = sorted(path.name for path in (tmp_path / "run/profile").iterdir())
    assert files == ["step_00000001.rank1.json.gz", "step_00000001.rank1.txt"]
