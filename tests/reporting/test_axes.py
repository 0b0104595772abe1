"""The axis of tokens and the axis of steps."""

from pathlib import Path

import pytest

from tests.reporting.page_reader import Page
from tests.reporting.run_files import (
    full_run,
    records,
    write_lines,
)
from trinity.reporting import axes, write_report
from trinity.reporting.jsonl import Columns


def test_step_axis_above_the_tokens(run: Path, tmp_path: Path) -> None:
    """Each step is at its tokens; no step axis if two runs reach a step at different tokens."""
    above = Page(write_report([run])).figures["Loss"]["layout"]["xaxis2"]
    assert (above["tickvals"], above["ticktext"]) == ([500, 1000], ["5", "10"])
    other = full_run(tmp_path / "other")
    assert "xaxis2" in Page(write_report([run, other], tmp_path / "r.html")).figures["Loss"]["layout"]
    write_lines(other / "metrics.jsonl", [record | {"tokens": 99 * record["step"]} for record in records()])
    assert "xaxis2" not in Page(write_report([run, other], tmp_path / "r.html")).figures["Loss"]["layout"]


@pytest.mark.parametrize(
    ("steps", "labels"),
    [
        (range(1, 2), ["1"]),
        (range(1, 4), ["1", "2", "3"]),
        (range(1, 61), ["20", "40", "60"]),
        (range(0, 5001), ["0", "1,000", "2,000", "3,000", "4,000", "5,000"]),
        (range(990, 1004), ["990", "995", "1,000"]),
    ],
)
def test_ticks_of_the_step_axis(steps: range, labels: list[str]) -> None:
    """Few round steps, each at its tokens: 3 a step, 7 a step from step 1000 on."""
    columns = Columns()
    for step in steps:
        columns.add(step, {"tokens": 3 * step + 4 * max(0, step - 1000)})
    ticks = axes.step_ticks([columns])
    assert [label for _, label in ticks] == labels
    for place, label in ticks:
        step = int(label.replace(",", ""))
        assert place == 3 * step + 4 * max(0, step - 1000)


def test_records_without_tokens() -> None:
    """A validation before the first step is at 0; another one is interpolated between its neighbours."""
    columns = Columns()
    for step, tokens in ((0, None), (1, 10), (2, None), (4, 70)):
        columns.add(step, {"loss": 1.0} if tokens is None else {"loss": 1.0, "tokens": tokens})
    assert axes.x_values(columns).tolist() == [0, 10, 30, 70]
