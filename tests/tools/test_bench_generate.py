"""The suite `generate` without timing: both generate the same tokens, and the figures of the table."""

import pytest
import torch
from benchmarks import generate, timing
from benchmarks.generate import Case, ratio, table

from tests.interop.small_model import CONFIG


def test_contenders_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model of a few kilobytes, past its window of 7."""
    monkeypatch.setattr(generate, "sizes", lambda: CONFIG)
    monkeypatch.setattr(generate, "CASES", {"small": Case(2, 9, 6)})
    monkeypatch.setattr(timing, "parts_of", lambda call: (call(lambda: None), [0.25, 1.0])[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    results = generate.run(quick=True)
    assert results["cases"]["small"]["equal"]
    assert ratio(results["cases"]["small"]) == 1
    assert "| small: 2 of 9 + 4 | trinity | 8 | 8 | 1.00 | yes |" in table(results)


def test_table_of_a_failure() -> None:
    """The other contender's figures stay; the goal counts as missed."""
    case = {
        "sizes": Case(2, 8, 10)._asdict(),
        "contenders": {"trinity": {"seconds": [1.0, 5.0]}, "transformers": {"failed": "out of memory"}},
        "equal": False,
    }
    text = table({"on": "a machine", "goal": 1.5, "cases": {"a": case}})
    assert "| a: 2 of 8 + 10 | trinity | 4 | 4 | nan | no |" in text  # 20 tokens in 5 s, 18 of them in 4 s
    assert "| transformers | out of memory |" in text
    assert "met in 0 of 1 cases" in text
