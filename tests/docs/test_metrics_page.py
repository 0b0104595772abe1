"""docs/metrics.md names exactly the fields that a run with everything switched on writes."""

import json
import re
from pathlib import Path

from tests.docs.markdown_pages import DOCS
from tests.training.run_files import MEASURED, train

UNSEEN = {"mfu", "padding_share", "validation_end_of_turn.NAME", "forgetting.NAME"}
"""Written on a GPU whose peak rate is known, of fine-tuning, and of a continued model."""


def test_fields_of_metrics(settings: dict) -> None:
    """Names and which are measured; words in capitals stand for any last part."""
    text = (DOCS / "metrics.md").read_text().split("## Fields of metrics.jsonl")[1]
    rows = re.findall(r"^\| (`[^|]*`) \| (.*) \|$", text, re.MULTILINE)
    described = {name: "*measured*" in meaning for names, meaning in rows for name in re.findall(r"`([^`]+)`", names)}
    words = ["log.probe_every=2", "log.norms_every=2", "checkpoint.asynchronous=false", "evaluation.by_position=true"]
    words += ["evaluation.needles={lengths: [640], kinds: [1, 2, 3], samples: 1}"]
    words += ["checkpoint.average={every: 3, window: 2}"]
    assert train(settings, *words) == 0
    lines = (Path(settings["run"]["dir"]) / "metrics.jsonl").read_text().splitlines()
    written = {_general(name) for line in lines for name in json.loads(line)}
    assert written | UNSEEN == described.keys()
    assert {name for name, measured in described.items() if measured} == MEASURED


def _general(name: str) -> str:
    """A field's name with a word in capitals in place of a source, a validation set, a parameter group or a number."""
    first, dot, _ = name.partition(".")
    if first.startswith("needle"):
        return f"{first}.LENGTH"
    if first == "validation_loss_at":
        return f"{first}.C.NAME"
    return first if not dot else f"{first}.GROUP" if first.endswith("_norm") else f"{first}.NAME"
