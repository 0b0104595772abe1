"""A run that resumes on another mesh several times equals an uninterrupted run of one process.

Data, steps and tokens exactly; floats in float64 to 1e-10, the bound of test_every_mesh.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner

from tests.parallel.mesh_runs import BOUND, assert_tensors, config_of
from tests.training.run_files import MEASURED, OF_THE_MESH
from trinity.parallel import mesh
from trinity.training.trainer import pretrain

WORDS = [
    "precision.compute=float64", "optim.muon.dtype=float64", "batch.sequences=12", "batch.microbatch=12",
    "batch.ramp=[{tokens: 1000, sequences: 24}]", "checkpoint.every=0", "evaluation.every=4",
]  # fmt: skip
LAST = 10

# two steps on each mesh; replicas and shards vary, experts are split 1, 2 and 4 ways, by number or (3 experts) by width
WAYS = {
    "1 → 4 → 2": [
        (1, []),
        (4, ["parallel.shard=4", "parallel.expert=2"]),
        (4, ["parallel.replicate=2", "parallel.expert=2"]),
        (2, ["parallel.shard=2"]),
        (4, ["parallel.replicate=4", "parallel.shard=1"]),
    ],
    "4 → 2 → 1": [
        (4, ["parallel.replicate=2", "parallel.shard=2"]),
        (2, ["parallel.shard=2", "parallel.expert=2"]),
        (4, ["parallel.shard=4", "parallel.expert=4"]),
        (2, ["parallel.replicate=2", "parallel.shard=1"]),
        (1, []),
    ],
    "by width": [
        (4, ["parallel.shard=4"]),
        (1, []),
        (2, ["parallel.shard=2"]),
        (4, ["parallel.replicate=2"]),
        (4, ["parallel.shard=4"]),
    ],
    "context": [
        (1, []),
        (2, ["parallel.context=2"]),
        (4, ["parallel.shard=2", "parallel.context=2", "parallel.expert=2"]),
        (1, []),
        (4, ["parallel.context=4", "parallel.expert=4"]),
    ],
}
CHANGES = {"by width": ["model.experts=3"]}


def run_in_group(settings: dict, words: list[str]) -> int:
    """Start or resume a run in a process group that stays open."""
    with mock.patch.object(mesh, "stop"):
        return pretrain(config_of(settings, words), [])


def run_alone(settings: dict, words: list[str]) -> int:
    """Start or resume a run in this process."""
    return pretrain(config_of(settings, words), [])


def results(folder: Path) -> SimpleNamespace:
    """A run's metrics and last checkpoint."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    state: dict = {}
    reader = dcp.FileSystemReader(folder / "checkpoints" / f"step_{LAST:08d}")
    dcp.state_dict_loader._load_state_dict(state, reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    metrics = [{key: value for key, value in line.items() if key not in MEASURED | OF_THE_MESH} for line in lines]
    return SimpleNamespace(metrics=metrics, state=state)


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=() if way == "1 → 4 → 2" else pytest.mark.slow) for way in WAYS]
)
def test_resume_on_other_meshes(recipe: Callable, processes: Callable, tmp_path: Path, way: str) -> None:
    """Every two steps another mesh resumes from the last checkpoint."""
    words = [*WORDS, *CHANGES.get(way, [])]
    settings = recipe(tmp_path / "one")
    assert run_alone(settings, [*words, f"run.steps={LAST}"]) == 0
    settings = recipe(tmp_path / "many")
    for leg, (world, parallel) in enumerate(WAYS[way], start=1):
        leg_words = [*words, *parallel, f"run.steps={2 * leg}"]
        codes = (
            [run_alone(settings, leg_words)] if world == 1 else processes(world).run(run_in_group, settings, leg_words)
        )
        assert codes == [0] * world
    resumed, expected = results(tmp_path / "many"), results(tmp_path / "one")
    compare(resumed, expected)


def compare(resumed: SimpleNamespace, expected: SimpleNamespace) -> None:
    """Integers are equal, floats within the bound."""
    assert len(resumed.metrics) == len(expected.metrics) == LAST
    for line, expected_line in zip(resumed.metrics, expected.metrics):
        # a leg ends with an evaluation that the uninterrupted run does not make
        line = {key: value for key, value in line.items() if key in expected_line}
        assert line.keys() == expected_line.keys()
        for key, value in expected_line.items():
            if isinstance(value, float):
                assert abs(line[key] - value) <= BOUND * max(1.0, abs(value)), f"{key} of step {expected_line['step']}"
            else:
                assert line[key] == value, key
    exact = [name for name in expected.state if name.startswith(("data.", "run.step", "run.bad", "run.collapse."))]
    assert sum(name.startswith("data.stream.") for name in exact) == 12
    for name in exact:
        assert torch.equal(resumed.state[name], expected.state[name]), name
    tensors = [
        {name: value for name, value in state.items() if name.startswith(("model.", "optim."))}
        for state in (resumed.state, expected.state)
    ]
    assert_tensors(*tensors, BOUND, "checkpoint")
