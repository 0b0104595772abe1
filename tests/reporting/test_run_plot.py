"""The plot of a run has the values of metrics.jsonl, and the same run gives the same bytes."""

import json
from pathlib import Path

import pytest

from trinity.errors import UserError
from trinity.reporting.run_log import read_run
from trinity.reporting.run_plot import plot_run, save_plot

pytest.importorskip("matplotlib")
LOSSES = [9.0, 7.0, 8.0, 6.0]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four steps of 10 tokens, validated at the second and the fourth."""
    records = [
        {"step": i, "tokens": 10 * i, "loss": loss, "max_violation": i / 2, "max_violation_mean": i / 4}
        | ({"validation_loss.code": loss + 1} if i % 2 == 0 else {})
        for i, loss in enumerate(LOSSES, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_curves_have_the_values(run: Path) -> None:
    loss, violation = plot_run("tiny", read_run(run).metrics).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in (*loss.lines, *violation.lines)}
    assert drawn["training"] == [[10, 9.0], [20, 7.0], [30, 8.0], [40, 6.0]]
    assert drawn["validation code"] == [[20, 8.0], [40, 7.0]]
    assert drawn["worst layer"] == [[10, 0.5], [20, 1.0], [30, 1.5], [40, 2.0]]
    assert drawn["mean over layers"] == [[10, 0.25], [20, 0.5], [30, 0.75], [40, 1.0]]


def test_same_run_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    first, again = (save_plot(run, tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == again
    assert b"validation code" in first
    assert save_plot(run, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_refusals(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--out=a\.jpg is not an image that can be written; end its name in \.svg"):
        save_plot(run, Path("a.jpg"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a run directory"):
        save_plot(tmp_path / "empty", tmp_path / "a.svg")
