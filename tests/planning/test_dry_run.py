"""What --dry-run prints."""

from pathlib import Path

import pytest
import yaml

from tests.planning.plan_configs import config_of
from trinity.config.load import to_yaml
from trinity.hardware import this_machine
from trinity.planning.dry_run import dry_run

ROOT = Path(__file__).parents[2]


def test_plan_of_this_machine(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict is in YAML comments, so the output is valid YAML; the machine is named; other ranks print nothing."""
    config = config_of("parallel.shard=2")
    dry_run(config, to_yaml(config))
    out = capsys.readouterr().out
    assert yaml.safe_load(out.split("\n\n")[0])["parallel"]["shard"] == 2
    machine = this_machine()
    assert out.startswith(f"# trinity on 2 × {machine.name}\n# fits ")
    assert f"# this machine   {machine.name}, {machine.origin}\n" in out
    assert "# note           the mesh needs 2 processes and one was started: planned for 2 like it" in out
    monkeypatch.setenv("RANK", "1")
    dry_run(config, to_yaml(config))
    assert capsys.readouterr().out == ""
