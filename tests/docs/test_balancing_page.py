"""docs/add_balancing_rule.md, applied to a copy of the package: its test passes and the trainer calls its rule."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.markdown_pages import DOCS, ROOT, fenced

PAGE = DOCS / "add_balancing_rule.md"
CONFIG = ROOT / "configs" / "smoke.yaml"
TRAINER = """
import torch
from trinity import balancing
from trinity.config import load_config
from trinity.models import ModelConfig, Trinity
from trinity.balancing import next_biases
from trinity.models.trinity import moe_layers

config = load_config(CONFIG, WORDS)
assert config.balancing.kind == "proportional"
model = Trinity(ModelConfig(layers=2, dense_layers=1, width=8, dense_width=8, heads=1, kv_heads=1, head_dim=8,
                            experts=4, active_experts=1, expert_width=8, vocab_size=16))
counts_ME = torch.tensor([[5, 1, 0, 2]])
got = next_biases(moe_layers(model), counts_ME, config.balancing)
assert torch.equal(got.bias_ME, balancing.proportional_update(torch.zeros(1, 4), counts_ME, 5e-3))
assert got.bias_ME.argmin() == 0 and got.bias_ME.argmax() == 2
print("done")
"""


@pytest.fixture
def changed_package(tmp_path: Path) -> Path:
    """A copy of the package with the page's changes."""
    shutil.copytree(ROOT / "trinity", tmp_path / "trinity", ignore=shutil.ignore_patterns("__pycache__"))
    for block in fenced(PAGE, "diff"):
        apply(block, tmp_path)
    return tmp_path


def apply(block: str, folder: Path) -> None:
    """Replace the lines marked ' ' and '-' by those marked ' ' and '+', at the only place where they are."""
    header, *lines = block.splitlines()
    path = folder / header.removeprefix("--- ")
    before, after = ("".join(line[1:] + "\n" for line in lines if line[:1] in marks) for marks in (" -", " +"))
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{header} has no such lines, or more than once: {before}"
    path.write_text(text.replace(before, after), encoding="utf-8")


def test_the_changes_of_the_page(changed_package: Path) -> None:
    """One process: it imports the copy, runs the page's test, and moves biases as the trainer does."""
    (test,) = fenced(PAGE, "python")
    command = next(line for line in "".join(fenced(PAGE, "sh")).splitlines() if "balancing.kind" in line)
    settings = [word for word in shlex.split(command) if "=" in word]
    values = f"CONFIG, WORDS = {str(CONFIG)!r}, {settings}"
    program = "\n".join([test, "test_proportional_follows_its_equation()", values, TRAINER])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(changed_package), str(ROOT / "kernels")])}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, cwd=changed_package, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
