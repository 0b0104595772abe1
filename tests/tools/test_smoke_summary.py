"""The summary reads steps alone, and ignores other records of a run."""

import json
import math
from pathlib import Path

from smoke_summary import read_metrics


def test_only_steps_are_read(tmp_path: Path) -> None:
    """A validation before the first step does not count as a step; a step whose loss is not finite does."""
    step = {"step": 1, "loss": None, "tokens_per_second": 2.0}
    lines = [{"step": 0, "validation_loss.a": 1.0}, step]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (read,) = read_metrics(tmp_path)
    assert math.isnan(read.pop("loss"))
    assert read == {"step": 1, "tokens_per_second": 2.0}
