"""Run directories with broken, incomplete or missing files."""

from pathlib import Path

from tests.reporting.page_reader import Page
from tests.reporting.run_files import (
    DENSE,
    EXPERTS,
    entries,
    records,
    write_lines,
)
from trinity.reporting import write_report


def test_only_metrics(run: Path) -> None:
    """A directory with metrics.jsonl alone, one step with two fields: a note for each section without data."""
    for path in run.iterdir():
        path.unlink()
    write_lines(run / "metrics.jsonl", [{"step": 1, "loss": 3.0}])
    page = Page(write_report([run]))
    assert list(page.figures) == ["Loss"]
    assert page.curves("Loss") == {"training": ([1], [3])}
    assert page.text.count("Left out, no data:") == 8
    assert page.row("parameters") == ["–"]


def test_broken_files(run: Path) -> None:
    """Repeated steps count once, tail files are ignored, and broken lines are counted in the notes."""
    before, again = records()[:9], [record | {"loss": record["loss"] + 1} for record in records()[4:10]]
    again[2] |= {"loss": None, "grad_norm": float("inf"), "mfu": float("nan"), "lr_muon": "fast", "tokens": 700}
    broken = [*before, {"no": "step"}, {"step": True}, {"step": -1}, {"step": 1 << 70}, *again]
    write_lines(run / "metrics.jsonl", broken, tail='{"step": 11, "loss": 7}\n{"step": 12, "lo')
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b"\xff")
    write_lines(run / "metrics.tail.1.jsonl", records())
    routed = entries()
    routed[1]["bias_range"] = "none"
    bad = [{"step": 3, "load": [[1, 2], [3]]}, {"step": 3, "load": [[1.0] * EXPERTS]}, {"step": 3}]
    write_lines(run / "router.jsonl", [*routed[:4], *bad, *routed[2:]], tail="[1, 2]\nnull\n\n{")
    (run / "events.jsonl").write_text("{" * 5000 + "\n" + '{"kind": 3}\n')
    (run / "status.json").write_text("{")
    (run / "config.2.yaml").write_text("a: [")
    page = Page(write_report([run]))
    kept = [*before[:4], *again, {"step": 11, "loss": 7}]
    finite = [record for record in kept if record["loss"] is not None and "tokens" in record]
    drawn = page.curves("Loss")["training"]
    assert drawn[1] == [*(record["loss"] for record in finite), 7]
    assert drawn[0][:-1] == [record["tokens"] for record in finite]
    assert "3 values are not finite numbers and are not drawn: grad_norm, loss, mfu" in page.text
    assert "4 lines of metrics.jsonl cannot be read" in page.text
    assert "5 lines of router.jsonl cannot be read" in page.text
    assert "2 lines of events.jsonl cannot be read" in page.text
    assert "status.json cannot be read" in page.text
    assert "config.2.yaml cannot be read as settings" in page.text
    assert [trace["name"] for trace in page.figures["Load of each expert"]["data"]] == [
        f"step {entry['step']}" for entry in routed
    ]
    assert page.curves("Expert bias by layer: largest − smallest")[f"layer {DENSE}"][0] == [200, 600, 800, 1000, 1200]
