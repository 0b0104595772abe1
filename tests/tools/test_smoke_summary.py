"""The summary reads steps alone, and ignores other records of a run."""

import json
import math
from pathlib import Path

from smoke_summary import before_and_after, fine_tuning_summary, read_metrics


def test_only_steps_are_read(tmp_path: Path) -> None:
    """A validation before the first step does not count as a step; a step whose loss is not finite does."""
    step = {"step": 1, "loss": None, "tokens_per_second": 2.0}
    lines = [{"step": 0, "validation_loss.a": 1.0}, step]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (read,) = read_metrics(tmp_path)
    assert math.isnan(read.pop("loss"))
    assert read == {"step": 1, "tokens_per_second": 2.0}


def test_fine_tuning_before_and_after(tmp_path: Path) -> None:
    """The first and the last evaluation, of whichever steps; the others between them are left out."""
    values = [(0, 5.0, 0.0), (4, 4.0, 0.25), (8, 2.5, 1.0)]
    lines = [{"step": step, "validation_loss.a": loss, "validation_end_of_turn.a": ends} for step, loss, ends in values]
    lines.insert(1, {"step": 1, "loss": 3.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = [{"step": step, "prompt": prompt, "text": f"{prompt}{step}"} for step, *_ in values for prompt in "xy"]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    assert before_and_after(tmp_path) == "x\n  before: x0\n  after:  x8\n\ny\n  before: y0\n  after:  y8\n"
    expected = "a 5.000 → 2.500 nats/trained token, turns that end 0.00 → 1.00"
    assert fine_tuning_summary(tmp_path, ["a"]) == expected
