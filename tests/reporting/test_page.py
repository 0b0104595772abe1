"""The report page: complete, self-contained, escaped; and what write_report refuses."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.reporting.page_reader import Page
from tests.reporting.run_files import (
    CHARTS,
    event_lines,
    full_run,
    records,
    write_lines,
)
from trinity.config.load import load_config
from trinity.errors import UserError
from trinity.reporting import write_report

EVIL = "</script><script>alert('%%BODY%%')</script><img src=x onerror=alert(1)>&amp; \ud800"


def test_trained_run(uninterrupted: Path, tmp_path: Path) -> None:
    """Every recorded field is drawn; charts without data or with zeros alone are named."""
    page = Page(write_report([uninterrupted], tmp_path / "new" / "report.html"))
    recorded = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    tokens = [record["tokens"] for record in recorded]
    assert page.curves("Loss")["training"] == (tokens, [record["loss"] for record in recorded])
    held_out = [(r["tokens"], r["validation_loss.held_out"]) for r in recorded if "validation_loss.held_out" in r]
    assert list(zip(*page.curves("Loss")["validation held_out"])) == held_out
    for title, curves in CHARTS.items():
        has = any(record.get(field) for record in recorded for field in curves.values())
        assert (title in page.figures) == has
        assert has or title in page.text
    assert page.row("state") == ["finished"]
    assert page.row("device")[0].startswith("1 × ")
    (tokens_file,) = Path(load_config(uninterrupted / "config.yaml").data.validation["held_out"]).glob("*.tokens")
    counts = np.unique(np.fromfile(tokens_file, "<u2"), return_counts=True)[1]
    entropy = math.log(counts.sum()) - (counts * np.log(counts)).sum() / counts.sum()
    drawn = page.curves("Loss")["unigram entropy, validation held_out"]
    assert drawn[0] == [0, tokens[-1]]
    assert drawn[1] == [pytest.approx(entropy, rel=1e-12)] * 2
    assert "unigram entropy, training" not in page.curves("Loss")  # its phases change the mixture


def test_text_is_never_markup(run: Path) -> None:
    """Names, messages, sources and settings appear unchanged and add no tag and no script."""
    tags = [tag for tag, _ in Page(write_report([run])).tags]
    scripts = Page(run / "report.html").scripts
    (run / "config.yaml").write_text(yaml.safe_dump({"run": {"name": EVIL, "steps": 3}}))
    write_lines(run / "metrics.jsonl", [record | {f"epoch.{EVIL}": 1.0} for record in records()])
    write_lines(
        run / "events.jsonl", [event | {"message": EVIL, "kind": "spike", "n": EVIL} for event in event_lines()]
    )
    (run / "status.json").write_text(json.dumps({"state": "stopped", "reason": EVIL}))
    page = Page(write_report([run]))
    evil_tags = [tag for tag, _ in page.tags]
    assert sorted(set(evil_tags)) == sorted(set(tags))
    assert evil_tags.count("script") == tags.count("script") == 3
    assert page.scripts[""] == scripts[""]
    displayed = EVIL.replace("\ud800", "�")
    assert page.row("") == [displayed]
    assert page.row("state") == [f"stopped: {displayed}"]
    assert sum(displayed in row for row in page.rows) == 1 + len(event_lines())  # the summary's head, and the events
    for figure in page.figures.values():
        for trace in figure["data"]:
            texts = [trace.get("name", ""), *trace.get("text", [])]
            assert not any("<" in word for word in texts), texts


def test_page_needs_no_network(run: Path) -> None:
    """No tag and no style refers to a URL, and the page's own script fetches nothing."""
    page = Page(write_report([run]))
    urls = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "srcset")]
    assert [url for url in urls if not url.startswith("#")] == ["data:,"]
    assert not re.search(r"url\(|@import", page.source[: page.source.index("</style>")])
    assert "fetch(" not in page.scripts[""]
    assert "import(" not in page.scripts[""]


def test_several_runs(run: Path, tmp_path: Path) -> None:
    """All in the same charts, distinguished by folder if their names are equal; settings that differ are listed."""
    other = full_run(tmp_path / "other", rate=0.05)
    (other / "config.1.yaml").write_text((other / "config.yaml").read_text().replace("lr: 0.05", "lr: 0.01"))
    (other / "router.jsonl").unlink()
    write_lines(other / "metrics.jsonl", records()[:7])
    page = Page(write_report([run, other], tmp_path / "both.html"))
    names = [f"mine ({folder})" for folder in (run, other)]
    drawn = page.curves("Learning rates")
    assert [name for name in drawn if not name.endswith(("restart", "rollback"))] == [
        f"{name} · {words}" for name in names for words in ("Muon", "AdamW")
    ]
    assert len(drawn[f"{names[1]} · Muon"][0]) == 7
    assert page.row("steps") == ["12", "7"]
    assert [row for row in page.rows if row and row[0] == "optim.muon.lr"] == [
        ["optim.muon.lr", "0.02", "0.01"],
        ["optim.muon.lr", "0.05", "0.01"],
    ]
    assert not any(row and row[0] == "run.dir" for row in page.rows)
    assert f"Routers by layer: {names[0]}" in page.text
    assert "Left out, no data: router.jsonl" in page.text
    assert not (run / "report.html").exists()


def test_table_of_contents(run: Path, tmp_path: Path) -> None:
    """A link to each section, in order; equal titles get distinct anchors."""
    other = full_run(tmp_path / "other", name="mine!")
    page = Page(write_report([run, other]))
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert links == ["#" + attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert len(set(links)) == len(links)
    assert links[:2] == ["#summary", "#loss"]
    assert [link for link in links if "routers" in link] == ["#routers-by-layer-mine", "#routers-by-layer-mine-7"]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda run: [run / "nowhere"], "nowhere is not a folder; give a run directory"),
        (lambda run: [run.parent], "is not a run directory: it has neither config.yaml nor metrics.jsonl"),
        (lambda run: (run / "metrics.jsonl").unlink(), "has no metrics.jsonl yet"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1, '), "holds no step yet"),
        (lambda run: [run, run / ".." / run.name], "is given twice"),
        (lambda run: (run / "report.html").write_text("<p>mine"), "exists and is not a report"),
        (lambda run: (run / "report.html").mkdir(), "is a folder; name an HTML file"),
    ],
)
def test_mistakes(run: Path, spoil: Callable, sentence: str) -> None:
    """Each is refused with one sentence, and no file changes."""
    directories = spoil(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=re.escape(sentence)):
        write_report(directories if isinstance(directories, list) else [run])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_only_a_report_is_overwritten(run: Path) -> None:
    """--out with another file's name is refused; an earlier report is replaced."""
    with pytest.raises(UserError, match=r"must end in \.html"):
        write_report([run], run / "metrics.jsonl")
    first = write_report([run]).read_bytes()
    assert write_report([run]).read_bytes()[:100] == first[:100]


def test_without_plotly(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install."""
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UserError, match=r'pip install "trinity-moe\[report\]"'):
        write_report([run])


def test_command_line(run: Path, tmp_path: Path, run_command: Callable) -> None:
    """Prints the report's path; a mistake gives exit code 2 and one line."""
    result = run_command("tools/report.py", run, "--out", tmp_path / "r.html")
    assert (result.code, result.output, result.errors) == (0, f"{tmp_path / 'r.html'}\n", "")
    wrong = run_command("tools/report.py", tmp_path / "none")
    assert (wrong.code, wrong.output, wrong.errors.count("\n")) == (2, "", 1)


def test_in_a_browser(run: Path, tmp_path: Path) -> None:
    """Headless Chromium, without a network, draws every figure and fills the legends."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if browser is None:
        pytest.skip("no Chromium")
    write_lines(run / "metrics.jsonl", [{**one, "lr_muon": 1e-5 * one["step"], "lr_adamw": 1e-5} for one in records()])
    report = write_report([run])
    dom = subprocess.run(
        [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=400,30000", "--virtual-time-budget=20000",
            "--dump-dom", report.as_uri(),
        ],
        capture_output=True, text=True, timeout=100,
    ).stdout  # fmt: skip
    page = Page(report)
    assert len(page.figures) == len(CHARTS) + 5
    assert dom.count('class="figure js-plotly-plot"') == len(page.figures)
    assert ">1e−4<" in dom  # a tick
    assert "µ</text>" not in dom
    assert dom.count('<g class="x2tick">') >= 2 * 20  # two ticks of the step axis in each chart
    assert re.search(r"<button><svg[^>]*>.*?</svg>validation held_out</button>", dom)
    assert re.search(r"<button><span[^>]*>▲ </span>spike</button>", dom)
