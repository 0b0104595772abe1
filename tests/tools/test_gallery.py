"""tools/experiments/gallery.py: the page is that of the recorded results."""

import json
import re
from collections import Counter
from pathlib import Path

import gallery
import pytest
import record_run
import shown
import spikes

from tests.tools.call_experiment import call_experiment
from trinity.config.load import load_config

ROOT = Path(__file__).parents[2]


def test_the_page_is_made_from_the_results() -> None:
    """docs/results.md is what the command writes now, every experiment is on it, and its plots exist."""
    assert (ROOT / "docs" / "results.md").read_text() == gallery.markdown_page()
    recorded = {path.stem for path in (ROOT / "tools" / "experiments" / "results").glob("*.json")}
    assert recorded == {each.name for each in shown.EXPERIMENTS}
    for each in gallery.shown():
        results = each.results()
        assert {"torch", "numpy", "tokenizers"} <= results.get(
            "versions", results["settings"].get("versions", {})
        ).keys()
        assert {run["seed"] for run in results.get("parts", results.get("runs"))} == {0, 1, 2}
        assert (ROOT / "docs" / each.plot).exists()
        assert each.command.split()[1] in {
            f"tools/experiments/{path.name}" for path in Path(gallery.__file__).parent.iterdir()
        }


def test_html(tmp_path: Path) -> None:
    """One file with every plot and table in it; links of the summary go to its own headings."""
    pytest.importorskip("markdown", reason="--html needs it")
    code, output, _ = call_experiment("gallery", "--out", tmp_path / "page.md", "--html", tmp_path / "page.html")
    assert (code, output.split()) == (0, [str(tmp_path / name) for name in ("page.md", "page.html")])
    assert (tmp_path / "page.md").read_text() == gallery.markdown_page()
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == len(gallery.shown())
    assert "<img" not in page
    assert set(re.findall(r'href="#([^"]*)"', page.split("<h2")[0])) <= set(re.findall(r'<h2 id="([^"]*)"', page))
    assert len(re.findall(r'<h2 id="', page)) == len(gallery.shown()) + 1


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [
        ("this agrees with the claim, and misses", "agrees"),
        ("This contradicts the claim.", "contradicts"),
        ("A: this agrees with the claim. B: this contradicts the claim.", "in part"),
        ("A: this agrees in part with the claim of X. B: this agrees with the claim of Y.", "in part"),
        ("this agrees in part with the claim", "in part"),
        ("this shows no clear difference", "no clear difference"),
        ("Without X: +0.1", "see there"),
    ],
)
def test_verdict(outcome: str, verdict: str) -> None:
    """The word of the summary follows from the sentences."""
    each = shown.EXPERIMENTS[0]._replace(conclude=lambda _results: outcome)
    assert each.verdict() == verdict


def test_recorded_run(tmp_path: Path) -> None:
    """The curves of metrics.jsonl in the order of steps, a repeated step as it was made last; null stays."""
    run = tmp_path / "run"
    run.mkdir()
    lines = [
        {"step": 1, "loss": 3.0, "grad_norm": 1.0}, {"step": 2, "loss": 9.0, "grad_norm": 9.0}, {"step": 2, "epoch": 1},
        {"step": 2, "loss": 2.0, "grad_norm": None}, {"loss": 7.0}, {"step": "a", "loss": 7.0},
        {"step": 3, "loss": 1.0, "grad_norm": 0.5},
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = ROOT / "configs" / "smoke.yaml"
    words = (run, "--config", config, "--out", tmp_path / "runs")
    code, output, _ = call_experiment("record_run", *words)
    assert (code, output.strip()) == (0, str(tmp_path / "runs" / "smoke.json"))
    content = json.loads((tmp_path / "runs" / "smoke.json").read_text())
    assert (content["loss"], content["grad_norm"]) == ([3.0, 2.0, 1.0], [1.0, None, 0.5])
    assert (content["config"], content["steps"]) == (str(config), 3)
    for mistake, sentence in (
        (words, "smoke.json exists; add --replace to write over it"),
        ((tmp_path, *words[1:], "--replace"), "metrics.jsonl has no step; give the directory of a run"),
        ((run, "--config", "x.yaml", *words[3:]), "--config x.yaml does not exist"),
    ):
        code, _, errors = call_experiment("record_run", *mistake)
        assert code == 2
        assert sentence in errors
        assert json.loads((tmp_path / "runs" / "smoke.json").read_text()) == content
    assert call_experiment("record_run", *words, "--replace")[0] == 0
    assert record_run.FIELDS == ("loss", "grad_norm")


def test_spikes_of_the_scaling_runs_are_of_batches() -> None:
    """The figures of the page: at these steps the norm is raised in every width that read the batch."""
    results = Path(spikes.RESULTS)
    runs = [
        run
        for name in ("scaling", "scaling_fifth")
        for run in json.loads((results / f"{name}.json").read_text())["parts"]
    ]
    for seed, step, widths, low, high in (
        (2, 459, [40, 48, 56, 72], 7.4, 11.1), (0, 577, [48, 56, 72], 8.1, 10.0), (0, 712, [56, 72], 6.5, 6.5),
        (0, 895, [56, 72], 35.1, 61.4),
    ):  # fmt: skip
        reached = [run for run in runs if run["seed"] == seed and len(run["loss"]) > step]
        raised = sorted(spikes.deviations_above(run["grad_norm"], step) for run in reached)
        assert sorted(run["width"] for run in reached) == widths
        assert (raised[0], raised[-1]) == pytest.approx((low, high), abs=0.05)
    found = [
        (run["seed"], spike.step, run["width"])
        for run in runs
        for spike in spikes.find_spikes(run["loss"], run["grad_norm"])
    ]
    steps = Counter((seed, step) for seed, step, _ in found)
    alone = [place for place, times in steps.items() if times == 1]
    longest = {(run["seed"], step) for run in runs if run["width"] == 56 for step in range(len(run["loss"]))}
    only_largest = [place for place in alone if place not in longest]
    assert (len(found), len(found) - len(alone), len(only_largest)) == (24, 11, 8)
    in_loss = [
        (run["seed"], run["width"], spike.step)
        for run in runs
        for spike in spikes.find_spikes(run["loss"], run["grad_norm"])
        if spike.in_loss
    ]
    assert in_loss == [(0, 56, 895)]


def test_no_spike_in_a_shipped_config() -> None:
    """Every recorded run of a shipped config has none, as the report says of its three."""
    runs = [run for run in spikes.recorded_runs() if run.group.startswith("`configs/")]
    assert {run.group for run in runs} == {f"`configs/{name}smoke.yaml`" for name in ("", "continue_", "sft_")}
    for run in runs:
        assert run.grad_norm is not None
        assert len(run.loss) == len(run.grad_norm) == load_config(ROOT / run.group.strip("`")).run.steps
        assert spikes.find_spikes(run.loss, run.grad_norm) == [], run.group
        jump = [*run.loss[:-1], run.loss[0] * 2]
        assert spikes.find_spikes(jump, run.grad_norm) == [spikes.Spike(len(jump) - 1, in_loss=True)]
