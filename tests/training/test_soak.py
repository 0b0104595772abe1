"""A run under torchrun that is killed repeatedly, against an undisturbed one (test_kills.py has more)."""

from pathlib import Path

import pytest
import yaml

from tests.training.run_files import metrics
from tests.training.soak import soak

pytestmark = pytest.mark.slow


def write(settings: dict, run: Path) -> Path:
    settings = settings | {"run": settings["run"] | {"dir": str(run), "steps": 30}, "checkpoint": {"every": 4}}
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return path


def test_torchrun_starts_a_killed_run_again(settings: dict, tmp_path: Path) -> None:
    """Three kills of one of two workers at random moments: no step missing, doubled or different in any metric."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    soak(write(settings, alone), alone, world=2, kills=0)
    outcome = soak(write(settings, killed), killed, world=2, kills=3)
    assert outcome["kills"] == 3
    assert [line["step"] for line in metrics(killed)] == list(range(1, 31))
    assert metrics(killed) == metrics(alone)
