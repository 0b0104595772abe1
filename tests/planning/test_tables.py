"""Text and JSON values of a plan, and the command that prints them."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.planning.plan_configs import config_of
from trinity.hardware import GPUS
from trinity.planning.plan import make_plan
from trinity.planning.tables import as_text, as_values, describe

ROOT = Path(__file__).parents[2]


def test_command(run_command: Callable, tmp_path: Path) -> None:
    """Tables on stdout, the same numbers in the file."""
    file = tmp_path / "plan.json"
    words = ["configs/smoke.yaml", "batch.sequences=16", "--gpu", "b200", "--gpus", "2", "--json", file]
    result = run_command("tools/plan.py", *words)
    assert result.code == 0, result.errors
    assert result.output.startswith("smoke on 2 × b200\n")
    values = json.loads(file.read_text(encoding="utf-8"))
    mesh = {"replicate": 1, "shard": 2, "expert": 1, "expert_shard": 2, "experts_by": "experts", "context": 1}
    assert values["mesh"] == mesh
    assert values["runs_on"] == [1, 2, 4, 8, 16]
    assert f"{values['memory']['total'] / 1e9:,.2f}" in result.output


def help_examples() -> list[str]:
    """The command lines in the tool's --help."""
    docstring = ast.get_docstring(ast.parse((ROOT / "tools/plan.py").read_text(encoding="utf-8")))
    return [line for line in docstring.splitlines() if line.startswith("python ")]


@pytest.mark.slow
@pytest.mark.parametrize("line", help_examples())
def test_help_examples_run(line: str, tmp_path: Path) -> None:
    """Each runs as printed, in a folder where --json may write."""
    for name in ("tools", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    words = [sys.executable, *shlex.split(line)[1:]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.match(r"[\w-]+ on \d+ × [\w-]+\n(fits|DOES NOT FIT) ", result.stdout)
    assert ("--json" in line) == (tmp_path / "plan.json").exists()


def test_text_and_values_agree() -> None:
    """Tables are aligned, and totals are sums."""
    config = config_of("parallel.shard=2", "parallel.expert=2", "parallel.replicate=-1")
    plan = make_plan(config, 8)
    values = as_values(plan)
    step = values["steps"][0]
    assert sum(values["memory"]["parts"].values()) == pytest.approx(values["memory"]["total"])
    assert sum(flow["seconds"] for flow in step["traffic"]) == pytest.approx(step["seconds"]["traffic"])
    assert step["mfu"] == step["work"]["model"] / step["seconds"]["step"] / 989e12
    assert step["tokens_per_second_per_gpu"] == 2 * 128 / step["seconds"]["step"]
    text = as_text(plan)
    assert text == describe(config, 8)
    for table in text.split("\n\n")[2:-1]:
        first, *lines = map(len, table.splitlines())
        assert max(lines) == first, table  # cells at the end may be empty


def test_verdict_comes_first() -> None:
    """The text begins with fit, tokens/s, time and GPU-hours; warnings come before the tables."""
    plan = make_plan(config_of())
    head = as_text(plan).split("\n\n")[0].splitlines()
    assert head[1] == f"fits           {plan.memory.total / 1e9:.1f} of {0.92 * 141:.1f} GB a GPU"
    assert head[2].startswith(f"speed          {plan.tokens_per_second(plan.steps[0]):,.0f} tokens/s a GPU")
    tight = make_plan(config_of(), None, GPUS["h200"]._replace(memory=1e6))
    head = as_text(tight).split("\n\n")[0].splitlines()
    assert head[1].startswith("DOES NOT FIT ")
    assert head[-1].startswith("warning: it does not fit: ")
