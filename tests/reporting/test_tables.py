"""Tables of a report: summary, events, goodput, samples."""

import shutil
from pathlib import Path

import numpy as np

from tests.reporting.page_reader import Page
from tests.reporting.run_files import (
    STEPS,
    event_lines,
    records,
    write_lines,
)
from trinity.config.load import load_config
from trinity.models.flops import parameter_counts
from trinity.reporting import write_report
from trinity.reporting.tables import _count


def test_tables(run: Path) -> None:
    """The summary's values, and the events that are not routine."""
    shutil.copy(run / "config.yaml", run / "config.1.yaml")
    page = Page(write_report([run]))
    loss = [record["loss"] for record in records()]
    counts = parameter_counts(load_config(run / "config.yaml").model)
    expected = {
        "state": "saved: asked",
        "steps": str(STEPS),
        "tokens": "1.2 k",
        "parameters": f"{_count(counts['total'])} ({_count(counts['active'])} active)",
        "loss, last step": f"{loss[-1]:.4g}",
        "loss, lowest step": f"{min(loss):.4g} (step {loss.index(min(loss)) + 1})",
        "bits per byte held_out, last": f"{records()[-1]['validation_bits_per_byte.held_out']:.4g}",
        "wall time": "0:00:00",
        "device": "–",
        "goodput, all starts": "–",
        "goodput, last start": f"{records()[-1]['goodput']:.1%}",
        "MFU, median": f"{np.median([record['mfu'] for record in records()]):.1%}",
        "restarts": "1",
        "skipped steps": "1",
        "rollbacks": "1",
    }
    assert {name: page.row(name) for name in expected} == {name: [value] for name, value in expected.items()}
    events = [row[1:] for row in page.rows if row and row[0] == "2026-01-02 03:04:05"]
    kept = [event for event in event_lines() if event["kind"] != "checkpoint"]
    assert events == [[str(e["step"]), e["kind"], "1", e["message"], f'{{"n": {e["step"]}}}'] for e in kept]
    assert "1 × checkpoint" in page.text
    assert f"<pre>{(run / 'config.yaml').read_text()}</pre>" in page.source


def test_goodput_over_all_starts(run: Path) -> None:
    """Ten steps of 3 s, one skipped and one after the last event, in 40 s from the first start to that event."""
    events = [
        {"time": f"2026-01-02T03:04:{second:02d}.500+00:00", "step": step, "kind": kind, "rank": 0, "message": ""}
        for second, step, kind in ((5, 0, "start"), (9, 10, "spike"), (20, 4, "resume"), (45, 9, "checkpoint"))
    ]
    write_lines(run / "events.jsonl", events)
    steps = [{"step": n, "tokens": n, "loss": 1.0, "step_seconds": 3.0, "skipped": n == 5} for n in range(1, 11)]
    write_lines(run / "metrics.jsonl", steps)
    events[2] |= {"device": "NVIDIA H200", "processes": 8}
    write_lines(run / "events.jsonl", events)
    page = Page(write_report([run]))
    assert page.row("goodput, all starts") == [f"{8 * 3 / 40:.1%}"]
    assert page.row("wall time") == ["0:00:40"]
    assert page.row("device") == ["8 × NVIDIA H200"]


def test_samples(run: Path) -> None:
    """Every prompt at some of the steps, the newest first; a broken line is counted."""
    lines = [
        {"step": step, "tokens": step, "prompt": f"p{n}", "text": f" {step}\n{n}"}
        for step in range(1, 12)
        for n in (1, 2)
    ]
    write_lines(run / "samples.jsonl", [*lines, {"step": 3, "prompt": 4, "text": ""}])
    page = Page(write_report([run]))
    assert [row for row in page.rows if len(row) == 3 and row[1] in ("p1", "p2")] == [
        [str(step), f"p{n}", f" {step}\n{n}"] for step in (11, 9, 7, 5, 3, 1) for n in (1, 2)
    ]
    assert "6 of 11 steps" in page.text
    assert "1 line of samples.jsonl cannot be read" in page.text
