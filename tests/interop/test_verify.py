"""largest_logit_difference measures a known difference, and names a missing package."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import enable_progress_bar

from tests.interop.small_model import make_model
from trinity.errors import UserError
from trinity.interop import export_hf
from trinity.interop.verify import largest_logit_difference
from trinity.models import Trinity


def test_a_known_difference_is_measured(model: Trinity, exported: Path, tokens: Tensor, tmp_path: Path) -> None:
    """Doubling the head doubles the logits: the difference equals the largest logit of the smaller model."""
    with torch.no_grad():
        model.head.weight.mul_(2)
    doubled = export_hf(model, tmp_path / "doubled", dtype=torch.float32)
    agreement = largest_logit_difference(doubled, exported, tokens)
    logits = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)(tokens).logits
    assert agreement.largest == logits.abs().max().item()
    assert agreement.difference == pytest.approx(agreement.largest, rel=1e-4)
    assert largest_logit_difference(make_model(), exported, tokens).difference < 1e-4 * agreement.largest


def test_no_bar_in_a_pipe(exported: Path, tokens: Tensor, capsys: pytest.CaptureFixture) -> None:
    """transformers would draw its own progress bar while loading."""
    enable_progress_bar()
    largest_logit_difference(exported, exported, tokens)
    assert capsys.readouterr().err == ""


def test_says_what_to_install(exported: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r'pip install "trinity-moe\[hf\]"'):
        largest_logit_difference(exported, exported, tokens)
