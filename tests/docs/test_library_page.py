"""The code of docs/library.md is a program that runs and does what the page says."""

import math
from pathlib import Path

import pytest
import torch

from tests.docs.markdown_pages import DOCS, fenced
from trinity.models import Trinity


def test_the_program_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """All blocks in one namespace; a new model's loss is near ln(8192), and four steps on one batch lower it by 1."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {}
    for block in fenced(DOCS / "library.md", "python"):
        exec(compile(block, "library.md", "exec"), names)
    assert names["logits"].shape == (2, 64, 8192)
    assert names["logits"].isfinite().all()
    lines = capsys.readouterr().out.splitlines()
    before = float(lines[0].rpartition(" ")[2])
    assert before == pytest.approx(math.log(8192), abs=0.5)
    steps = [float(line.split()[3].rstrip(",")) for line in lines[1:5]]
    assert steps[0] == pytest.approx(before, abs=0.011)
    assert steps[3] < before - 1
    assert len(names["new"]) == 8
    assert all(0 <= token < 8192 for token in names["new"])
    assert lines[-1] == "the same logits: True"
    assert all(layer.expert_bias.abs().max() > 0 for layer in names["layers"])
    assert isinstance(names["loaded"], Trinity)
    assert (tmp_path / "my-model" / "model.safetensors").is_file()
