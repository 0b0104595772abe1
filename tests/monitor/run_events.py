"""The events of a run, as tests read them."""

import json
from pathlib import Path


def events(run: Path, kind: str | None = None) -> list[dict]:
    """events.jsonl, or its events of one kind."""
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]
