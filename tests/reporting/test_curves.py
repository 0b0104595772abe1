"""Line charts: values read back from the figures, event marks, smoothing and downsampling."""

from pathlib import Path

import pytest

from tests.reporting.page_reader import Page
from tests.reporting.run_files import (
    CHARTS,
    EXPERTS,
    LAYERS,
    STEPS,
    entries,
    records,
    write_lines,
)
from trinity.reporting import write_report
from trinity.reporting.curves import line_mode


def test_charts_have_exact_values(run: Path) -> None:
    """Equal to the file's: doubles are encoded as base64."""
    page = Page(write_report([run]))
    tokens = [record["tokens"] for record in records()]
    for title, curves in CHARTS.items():
        drawn = page.curves(title)
        for words, field in curves.items():
            assert drawn[words] == (tokens, [record[field] for record in records()]), (title, words)
    assert "Left out" not in page.text
    assert page.figures["Gradient norm before clipping"]["layout"]["yaxis"]["type"] == "log"


def test_event_marks(run: Path) -> None:
    """A mark is at its step's tokens and the curve's value; a skipped step in metrics.jsonl needs no event."""
    page = Page(write_report([run]))
    loss = {record["step"]: record["loss"] for record in records()}
    drawn = page.curves("Loss")
    for words, step in {"spike": 7, "rollback": 7, "restart": 4, "update skipped": 5}.items():
        # smoothed over a span of one step: m + (y - m) may differ from y in the last bit
        assert drawn[words] == ([100 * step], [pytest.approx(loss[step], rel=1e-15)])
    assert page.curves("Learning rates")["restart"] == ([400], [records()[3]["lr_muon"]])
    assert page.curves("Learning rates")["rollback"] == ([700], [records()[6]["lr_muon"]])
    assert page.curves("MaxVio")["router warning"] == ([900], [records()[8]["max_violation"]])
    assert page.curves("Gradient norm before clipping")["update skipped"] == ([500], [records()[4]["grad_norm"]])


def test_validation_before_the_first_step(run: Path) -> None:
    """A run that continues a model has a record of step 0 with its validation alone."""
    write_lines(run / "metrics.jsonl", [{"step": 0, "validation_loss.held_out": 3.5}, *records()])
    page = Page(write_report([run]))
    drawn = page.curves("Loss")
    assert [axis[0] for axis in drawn["validation held_out"]] == [0, 3.5]
    assert drawn["training"][0][0] == 100
    assert page.row("loss, last step") == [f"{records()[-1]['loss']:.4g}"]


def test_short_curves_have_markers(run: Path) -> None:
    """Up to 10 points: markers; up to 60: a line with markers."""
    assert [line_mode(points) for points in (1, 10, 11, 60, 61)] == [
        "markers", "markers", "lines+markers", "lines+markers", "lines",
    ]  # fmt: skip
    write_lines(run / "metrics.jsonl", records()[:1])
    figure = Page(write_report([run])).figures["Loss"]
    assert [trace["mode"] for trace in figure["data"] if trace["meta"] == "training"] == ["markers"]


def test_charts_of_zeros_are_left_out(run: Path) -> None:
    """A chart whose values are 0 in every step and layer is named, not drawn."""
    zeros = {"dead_experts": 0.0, "z_loss": 0.0, "sequence_loss": 0, "checkpoint_seconds": 0.0}
    write_lines(run / "metrics.jsonl", [record | zeros for record in records()])
    write_lines(
        run / "router.jsonl",
        [entry | {"dead": [0.0] * LAYERS, "bias": [[0] * EXPERTS] * LAYERS} for entry in entries()],
    )
    page = Page(write_report([run]))
    titles = ["Other losses", "Experts without a token", "Share of experts without a token, by layer"]
    titles.append(f"Expert bias after step {STEPS}")
    for title in titles:
        assert title not in page.figures
    assert "Left out, always 0: Other losses." in page.text
    assert f"Left out, always 0: {titles[2]}, {titles[3]}." in page.text
    assert list(page.curves("Waiting")) == ["for data", "for a checkpoint"]


def test_long_curves_are_downsampled(run: Path) -> None:
    """At most 2000 points a curve, peaks kept, with a note on the page."""
    many = [{"step": step, "tokens": step, "grad_norm": 1 + step % 7 / 10} for step in range(1, 20_001)]
    many[12_345]["grad_norm"], many[678]["grad_norm"] = 99.0, 0.001
    write_lines(run / "metrics.jsonl", many)
    page = Page(write_report([run]))
    tokens, norms = page.curves("Gradient norm before clipping")["norm"]
    assert len(tokens) <= 2000
    assert (12_346, 99.0) in zip(tokens, norms)
    assert (679, 0.001) in zip(tokens, norms)
    assert tokens == sorted(set(tokens))
    assert "Downsampled to 2000 points a curve." in page.text
