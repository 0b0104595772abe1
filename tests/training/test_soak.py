"""Runs of several processes that are killed again and again, against one that is left alone."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
import yaml
from run_files import metrics
from soak import lines_of, pids_below, soak, start

pytestmark = pytest.mark.slow


def write(settings: dict, run: Path, **changes: dict) -> Path:
    settings = (
        settings | {"run": settings["run"] | {"dir": str(run), "steps": 40}, "checkpoint": {"every": 4}} | changes
    )
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return path


def test_torchrun_starts_a_killed_run_again(settings: dict, tmp_path: Path) -> None:
    """Three kills of one of two workers at random moments: no step missing, doubled or different in any figure."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    soak(write(settings, alone), alone, world=2, kills=0)
    figures = soak(write(settings, killed), killed, world=2, kills=3)
    assert figures["kills"] == 3
    assert [line["step"] for line in metrics(killed)] == list(range(1, 41))
    assert metrics(killed) == metrics(alone)


def test_killed_and_gone_on_with_another_number_of_processes(settings: dict, tmp_path: Path) -> None:
    """Whole runs killed at random moments on 1, 2 and 4 processes in turn: data, steps and tokens exactly.

    In float64, where meshes agree to 1e-10 (tests/parallel/test_every_mesh.py); 40 steps later to 1e-7.
    """
    exact = {"precision": {"compute": "float64"}}
    exact["optim"] = settings["optim"] | {"muon": settings["optim"]["muon"] | {"dtype": "float64"}}
    exact["batch"] = {"sequences": 12, "microbatch": 12}
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    soak(write(settings, alone, **exact), alone, world=1, kills=0)
    config, numbers = write(settings, killed, **exact), random.Random(2)
    for world in (2, 4, 1):
        process = start(config, world, restarts=0)
        before = lines_of(killed / "metrics.jsonl")
        while process.poll() is None and lines_of(killed / "metrics.jsonl") == before:
            time.sleep(0.01)
        time.sleep(numbers.uniform(0, 1))
        for pid in [*pids_below(process.pid), process.pid]:
            kill(pid)
        process.wait()
    soak(config, killed, world=2, kills=0)
    one, other = metrics(alone), metrics(killed)
    assert [line["step"] for line in other] == list(range(1, 41))
    for expected, found in zip(one, other):
        for key in ("tokens", "sequences", "source_tokens.code", "source_tokens.prose", "epoch.code", "epoch.prose"):
            assert found[key] == expected[key]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-7)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)


def kill(pid: int) -> None:
    """SIGKILL, if the process is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
