"""Runs of several processes from start to exit code: signals, user errors, bad steps, and torchrun."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml

from tests.parallel.mesh_runs import config_of, full_copy
from tests.training.run_files import MEASURED, OF_THE_MESH
from trinity.checkpoint.directory import CheckpointDirectory
from trinity.errors import UserError
from trinity.parallel import mesh
from trinity.run_directory import RunDirectory
from trinity.training import train_step, trainer
from trinity.training.resume import Origin
from trinity.training.train_step import StepResult
from trinity.training.trainer import Trainer, pretrain

ROOT = Path(__file__).parents[2]
WORDS = ["batch.sequences=4", "batch.ramp=[]", "parallel.expert=2", "run.steps=4", "evaluation.every=0"]


def stopped_run(settings: dict) -> int:
    """Only rank 1 gets SIGTERM, in the middle of its second step."""
    steps = []

    def step(*args: object) -> StepResult:
        steps.append(1)
        if dist.get_rank() == 1 and len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step.train_step(*args)

    with mock.patch.object(mesh, "stop"), mock.patch.object(trainer, "train_step", step):
        return pretrain(config_of(settings, WORDS), [])


def test_sigterm_on_one_rank_stops_all(recipe: Callable, processes: Callable, tmp_path: Path) -> None:
    """All ranks finish the step, save and end with 75; the same command resumes and finishes."""
    settings = recipe(tmp_path / "run")
    assert processes(2).run(stopped_run, settings) == [75, 75]
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status == {"state": "saved", "code": 75, "step": 2, "reason": "asked to stop by SIGTERM"}
    assert processes(2).run(pretrain_code, settings, []) == [0, 0]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def pretrain_code(settings: dict, words: list[str]) -> int | str:
    """Exit code of a run, or the message of its UserError."""
    with mock.patch.object(mesh, "stop"):
        try:
            return pretrain(config_of(settings, [*WORDS, *words]), [])
        except UserError as error:
            return str(error)


def test_a_user_error_reaches_every_rank(recipe: Callable, processes: Callable, tmp_path: Path) -> None:
    """Only rank 0 sees a STOP file; the error reaches every rank, and none hangs."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/STOP").write_text("too many bad steps")
    messages = processes(2).run(pretrain_code, recipe(tmp_path / "run"), [])
    assert messages == [f"{tmp_path}/run/STOP says: too many bad steps; remove that file to run again"] * 2


def step_with_nan(settings: dict, where: str) -> tuple[bool, dict, dict, list[str]]:
    """One step in which rank 1's gradient or loss has a NaN: its metrics, and the names of changed tensors."""
    config = config_of(settings, WORDS)
    ranks = mesh.start(config.parallel, config.model, 1, False)
    path = Path(config.run.dir)
    training = Trainer(config, ranks, RunDirectory(path, ranks.is_first), Origin(CheckpointDirectory.at(path)))
    good = training.one_step()
    before = {name: full_copy(tensor) for name, tensor in training.state().items() if not name.startswith("data.")}
    backward = train_step._forward_and_backward

    def poisoned(model: torch.nn.Module, *args: object) -> list:
        losses = backward(model, *args)
        if dist.get_rank() == 1 and where == "gradient":
            model.blocks[2].ffn.experts.down.grad.to_local()[0, 0, 0] = float("nan")
        elif dist.get_rank() == 1:
            losses[0].ce_BS[0, 0] = float("nan")
        return losses

    with mock.patch.object(train_step, "_forward_and_backward", poisoned):
        bad = training.one_step()
    after = {name: full_copy(tensor) for name, tensor in training.state().items() if not name.startswith("data.")}
    training.close()
    training.directory.release()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    return good["skipped"], bad["skipped"], bad["step"], sorted(changed)


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_nan_on_one_rank_skips_the_step(recipe: Callable, processes: Callable, tmp_path: Path, where: str) -> None:
    """On every rank only the counters of steps and of sequences change, and the state of the collapse monitor."""
    results = processes(2).run(step_with_nan, recipe(tmp_path / "run"), where)
    changed = ["run.bad_steps", "run.batch_history", "run.collapse.recent", "run.step"]
    assert results == [(False, True, 2, changed)] * 2


def torchrun(world: int, *words: object) -> subprocess.CompletedProcess:
    """Run launch/pretrain.py under torchrun, as a user does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    return subprocess.run(
        [*command, "launch/pretrain.py", *map(str, words)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def test_torchrun_prints_a_user_error_once(recipe: Callable, tmp_path: Path) -> None:
    """Two processes, one message: the config is refused before any process group exists."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(recipe(tmp_path / "run")))
    result = torchrun(2, config, "parallel.shard=3")
    assert result.returncode == 1
    assert result.stderr.count("error: parallel.replicate=1 × shard=3 × context=1 does not make 2 processes") == 1
    assert 'launch/pretrain.py", line' not in result.stderr  # any traceback is torchrun's own
    assert not (tmp_path / "run").exists()


def test_torchrun_equals_one_process(recipe: Callable, tmp_path: Path) -> None:
    """metrics.jsonl of two processes and of one, in float64; with validation, whose rows do not divide by two."""
    words = [
        "precision.compute=float64", "optim.muon.dtype=float64", "evaluation.every=2", "batch.sequences=4",
        "batch.ramp=[]", "run.steps=4", "checkpoint.every=0",
    ]  # fmt: skip
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(recipe(tmp_path / "run")))
    one_process, two_processes = tmp_path / "run1", tmp_path / "run2"
    assert pretrain(config_of(recipe(one_process), words), []) == 0
    result = torchrun(2, config, *words, f"run.dir={two_processes}", "parallel.expert=2")
    assert result.returncode == 0, result.stderr
    assert json.loads((two_processes / "status.json").read_text())["code"] == 0
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one_process, two_processes)
    ]
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 4]
    assert "validation_loss.held_out" in lines[1][1]
    for one, two in zip(*lines, strict=True):
        for key in one.keys() - MEASURED - OF_THE_MESH:
            assert two[key] == pytest.approx(one[key], rel=1e-10, abs=1e-12), key
