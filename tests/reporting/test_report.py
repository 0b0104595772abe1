"""A report says what the files say: values read back from its figures, nothing fetched, nothing taken for markup."""

import base64
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from trinity.config.load import load_config
from trinity.errors import UserError
from trinity.models.flops import parameter_counts
from trinity.reporting import axes, unigram, write_report
from trinity.reporting.curves import mode
from trinity.reporting.downsample import moments, smooth, thin
from trinity.reporting.jsonl import Columns
from trinity.reporting.tables import _count

LAYERS, EXPERTS, STEPS = 3, 4, 12
DENSE = 1
"""Layers of the smoke model before the first MoE layer."""
EVIL = "</script><script>alert('%%BODY%%')</script><img src=x onerror=alert(1)>&amp; \ud800"
CHARTS = {
    "Loss": {"training": "loss", "validation held_out": "validation_loss.held_out"},
    "Validation by bytes": {"held_out": "validation_bits_per_byte.held_out"},
    "Other losses": {"z-loss": "z_loss", "sequence loss": "sequence_loss"},
    "Learning rates": {"Muon": "lr_muon", "AdamW": "lr_adamw"},
    "Gradient norm before clipping": {"norm": "grad_norm"},
    "Weight norms": {"experts": "weight_norm.experts", "head": "weight_norm.head"},
    "Update norms": {"experts": "update_norm.experts"},
    "Largest logits": {"head": "max_head_logit", "attention": "max_attention_logit"},
    "Throughput": {"tokens/s": "tokens_per_second"},
    "MFU": {"MFU": "mfu"},
    "Goodput": {"goodput": "goodput"},
    "Waiting": {"for data": "data_seconds", "for a checkpoint": "checkpoint_seconds"},
    "Slowest and fastest rank apart": {"spread": "rank_seconds_spread"},
    "Memory": {"peak": "memory_gib"},
    "BatchHet": {"BatchHet": "batch_het"},
    "Tokens by source": {"code": "source_tokens.code", "prose": "source_tokens.prose"},
    "Epochs by source": {"code": "epoch.code"},
    "MaxVio": {"worst layer": "max_violation", "mean of the layers": "max_violation_mean"},
    "Experts without a token": {"dead experts": "dead_experts"},
    "Starved experts": {"starved": "starved_experts"},
    "Router entropy": {"entropy": "router_entropy"},
    "Expert bias": {"range": "bias_range"},
}
"""Every chart: its curves and the fields that they show."""


class Page(HTMLParser):
    """A page's tags, words, tables and figures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.scripts: dict[str, str] = {}
        self._open = ("", {})
        self.source = path.read_text(encoding="ascii")
        self.feed(self.source)
        self.close()
        self.figures = {figure["title"]: figure for figure in json.loads(self.scripts["figures"])}
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self._open = (tag, dict(attrs))
        self.tags.append(self._open)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ("", {})

    def handle_data(self, data: str) -> None:
        tag, attributes = self._open
        if tag == "script":
            self.scripts[attributes.get("id", "")] = data
            return
        self.words.append(data)
        if tag in ("td", "th"):
            self.rows[-1][-1] += data

    def curves(self, title: str) -> dict[str, tuple[list, list]]:
        """(x, y) of each curve of a figure, by its name in the legend."""
        return {trace["meta"]: (array(trace["x"]), array(trace["y"])) for trace in self.figures[title]["data"]}

    def row(self, name: str) -> list[str]:
        """What stands beside a name in the first table that has it."""
        return next(row[1:] for row in self.rows if row and row[0] == name)


def array(value: list | dict) -> list:
    """Numbers as plotly's JSON holds them: a list, or base64 with its type."""
    if isinstance(value, list):
        return value
    flat = np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
    shape = [int(size) for size in value.get("shape", "").split(",") if size]
    return (flat.reshape(shape) if shape else flat).tolist()


def records(steps: int = STEPS) -> list[dict]:
    """Steps with every field that is drawn, each value once."""
    fields = [field for curves in CHARTS.values() for field in curves.values()]
    rng = np.random.default_rng(0)
    made = []
    for step in range(1, steps + 1):
        values = dict(zip(fields, rng.uniform(0.1, 1, len(fields)).tolist()))
        made.append({"step": step, "tokens": 100 * step, **values, "skipped": step == 5, "attempt": 1})
    return made


def entries() -> list[dict]:
    """Lines of router.jsonl."""
    rng = np.random.default_rng(1)
    made = []
    for step in range(2, STEPS + 1, 2):
        load = rng.dirichlet(np.ones(EXPERTS), LAYERS)
        by_layer = {name: rng.random(LAYERS).tolist() for name in ("max_violation", "dead", "bias_range")}
        bias = rng.normal(size=(LAYERS, EXPERTS)).tolist()
        made.append({"step": step, "tokens": 100 * step, "load": load.tolist(), **by_layer, "bias": bias})
    return made


def happened() -> list[dict]:
    """Lines of events.jsonl."""
    told = [
        ("start", 0, "begun"), ("checkpoint", 4, "saved"), ("spike", 7, "far above"), ("rollback", 7, "back to 4"),
        ("resume", 4, "from 4"), ("collapse", 9, "layer 2"),
    ]  # fmt: skip
    time = "2026-01-02T03:04:05.678+00:00"
    return [{"time": time, "step": at, "kind": kind, "rank": 1, "message": text, "n": at} for kind, at, text in told]


def lines(path: Path, objects: list[dict], tail: str = "") -> None:
    """Write one object a line."""
    path.write_text("".join(json.dumps(one) + "\n" for one in objects) + tail)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with every file."""
    return full_run(tmp_path / "run")


def full_run(folder: Path, name: str = "mine", rate: float = 0.02) -> Path:
    """A run directory with every file; made, not trained."""
    folder.mkdir()
    settings = {
        "run": {"name": name, "dir": "x", "steps": STEPS},
        "optim": {"muon": {"lr": rate}},
        "model": {"name": "smoke"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "status.json").write_text(json.dumps({"state": "saved", "code": 75, "step": STEPS, "reason": "asked"}))
    lines(folder / "metrics.jsonl", records())
    lines(folder / "events.jsonl", happened())
    lines(folder / "router.jsonl", entries())
    return folder


def test_every_chart_shows_the_values(run: Path) -> None:
    """Exactly: doubles travel as base64."""
    page = Page(write_report([run]))
    tokens = [record["tokens"] for record in records()]
    for title, curves in CHARTS.items():
        drawn = page.curves(title)
        for words, field in curves.items():
            assert drawn[words] == (tokens, [record[field] for record in records()]), (title, words)
    assert "Left out" not in page.text
    assert page.figures["Gradient norm before clipping"]["layout"]["yaxis"]["type"] == "log"


def test_marks_stand_on_the_curves(run: Path) -> None:
    """At the step's tokens and the curve's height; a skipped step is known from metrics.jsonl alone."""
    page = Page(write_report([run]))
    loss = {record["step"]: record["loss"] for record in records()}
    drawn = page.curves("Loss")
    for words, step in {"spike": 7, "rollback": 7, "restart": 4, "update skipped": 5}.items():
        assert drawn[words] == ([100 * step], [loss[step]])
    assert page.curves("Learning rates")["restart"] == ([400], [records()[3]["lr_muon"]])
    assert page.curves("Learning rates")["rollback"] == ([700], [records()[6]["lr_muon"]])
    assert page.curves("MaxVio")["router warning"] == ([900], [records()[8]["max_violation"]])
    assert page.curves("Gradient norm before clipping")["update skipped"] == ([500], [records()[4]["grad_norm"]])


def test_routers_by_layer(run: Path) -> None:
    """Loads as multiples of an even share (float32), the slider's entries, and what has a number a layer."""
    page = Page(write_report([run]))
    load = page.figures["Load of each expert"]["data"]
    assert [trace["name"] for trace in load] == [f"step {entry['step']}" for entry in entries()]
    assert [trace["visible"] for trace in load] == [False] * (len(entries()) - 1) + [True]
    for trace, entry in zip(load, entries()):
        assert array(trace["z"]) == (np.array(entry["load"]) * EXPERTS).astype(np.float32).tolist()
    slider = page.figures["Load of each expert"]["layout"]["sliders"][0]["steps"]
    assert [step["args"][0]["visible"].index(True) for step in slider] == list(range(len(entries())))
    heat = page.figures["MaxVio by layer"]["data"][0]
    assert array(heat["z"]) == np.array([entry["max_violation"] for entry in entries()]).T.tolist()
    assert array(heat["x"]) == [0, *(entry["tokens"] for entry in entries())]
    for one in (heat, *load, page.figures[f"Expert bias after step {STEPS}"]["data"][0]):
        assert array(one["y"]) == [DENSE, DENSE + 1, DENSE + 2]
    paths = page.curves("Expert bias by layer: largest − smallest")
    for layer in range(LAYERS):
        assert paths[f"layer {DENSE + layer}"][1] == [entry["bias_range"][layer] for entry in entries()]
    bias = page.figures[f"Expert bias after step {STEPS}"]["data"][0]
    assert array(bias["z"]) == np.array(entries()[-1]["bias"], np.float32).tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 9, 10, 1001])
def test_moments(count: int) -> None:
    """First, middle and last are among them."""
    shown = moments(count, 9)
    assert {0, count - 1} <= set(shown)
    assert min(abs(entry - (count - 1) / 2) for entry in shown) <= 0.5
    assert len(shown) == min(count, 9)


def test_tables(run: Path) -> None:
    """The summary's figures, and the events that are not routine."""
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
    told = [row[1:] for row in page.rows if row and row[0] == "2026-01-02 03:04:05"]
    kept = [event for event in happened() if event["kind"] != "checkpoint"]
    assert told == [[str(e["step"]), e["kind"], "1", e["message"], f'{{"n": {e["step"]}}}'] for e in kept]
    assert "1 × checkpoint" in page.text
    assert f"<pre>{(run / 'config.yaml').read_text()}</pre>" in page.source


def test_goodput_over_all_starts(run: Path) -> None:
    """Ten steps of 3 s, one of them skipped and one made after the last event, in 40 s from start to that event."""
    told = [
        {"time": f"2026-01-02T03:04:{second:02d}.500+00:00", "step": step, "kind": kind, "rank": 0, "message": ""}
        for second, step, kind in ((5, 0, "start"), (9, 10, "spike"), (20, 4, "resume"), (45, 9, "checkpoint"))
    ]
    lines(run / "events.jsonl", told)
    steps = [{"step": n, "tokens": n, "loss": 1.0, "step_seconds": 3.0, "skipped": n == 5} for n in range(1, 11)]
    lines(run / "metrics.jsonl", steps)
    told[2] |= {"device": "NVIDIA H200", "processes": 8}
    lines(run / "events.jsonl", told)
    page = Page(write_report([run]))
    assert page.row("goodput, all starts") == [f"{8 * 3 / 40:.1%}"]
    assert page.row("wall time") == ["0:00:40"]
    assert page.row("device") == ["8 × NVIDIA H200"]


def test_a_real_run(uninterrupted: Path, tmp_path: Path) -> None:
    """Whatever it recorded is drawn; what it did not, or was always 0, is named."""
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


def test_only_metrics(run: Path) -> None:
    """A directory with nothing else, of one step with two fields: one line for each thing that is left out."""
    for path in run.iterdir():
        path.unlink()
    lines(run / "metrics.jsonl", [{"step": 1, "loss": 3.0}])
    page = Page(write_report([run]))
    assert list(page.figures) == ["Loss"]
    assert page.curves("Loss") == {"training": ([1], [3])}
    assert page.text.count("Left out, no data:") == 8
    assert page.row("parameters") == ["–"]


def test_files_in_a_bad_state(run: Path) -> None:
    """Steps that were done again count once, a tail that was kept aside not at all; the half-written line may come."""
    before, again = records()[:9], [record | {"loss": record["loss"] + 1} for record in records()[4:10]]
    again[2] |= {"loss": None, "grad_norm": float("inf"), "mfu": float("nan"), "lr_muon": "fast", "tokens": 700}
    broken = [*before, {"no": "step"}, {"step": True}, {"step": -1}, {"step": 1 << 70}, *again]
    lines(run / "metrics.jsonl", broken, tail='{"step": 11, "loss": 7}\n{"step": 12, "lo')
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b"\xff")
    lines(run / "metrics.tail.1.jsonl", records())
    routed = entries()
    routed[1]["bias_range"] = "none"
    bad = [{"step": 3, "load": [[1, 2], [3]]}, {"step": 3, "load": [[1.0] * EXPERTS]}, {"step": 3}]
    lines(run / "router.jsonl", [*routed[:4], *bad, *routed[2:]], tail="[1, 2]\nnull\n\n{")
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


def test_text_is_never_markup(run: Path) -> None:
    """Names, messages, sources and settings come back as they were, and bring no tag and no script with them."""
    tags = [tag for tag, _ in Page(write_report([run])).tags]
    scripts = Page(run / "report.html").scripts
    (run / "config.yaml").write_text(yaml.safe_dump({"run": {"name": EVIL, "steps": 3}}))
    lines(run / "metrics.jsonl", [record | {f"epoch.{EVIL}": 1.0} for record in records()])
    lines(run / "events.jsonl", [event | {"message": EVIL, "kind": "spike", "n": EVIL} for event in happened()])
    (run / "status.json").write_text(json.dumps({"state": "stopped", "reason": EVIL}))
    page = Page(write_report([run]))
    found = [tag for tag, _ in page.tags]
    assert sorted(set(found)) == sorted(set(tags))
    assert found.count("script") == tags.count("script") == 3
    assert page.scripts[""] == scripts[""]
    seen = EVIL.replace("\ud800", "�")
    assert page.row("") == [seen]
    assert page.row("state") == [f"stopped: {seen}"]
    assert sum(seen in row for row in page.rows) == 1 + len(happened())  # the summary's head, and the events
    for figure in page.figures.values():
        for trace in figure["data"]:
            shown = [trace.get("name", ""), *trace.get("text", [])]
            assert not any("<" in word for word in shown), shown


def test_nothing_is_fetched(run: Path) -> None:
    """No tag, no style and no script of ours names another place."""
    page = Page(write_report([run]))
    places = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "srcset")]
    assert [place for place in places if not place.startswith("#")] == ["data:,"]
    assert not re.search(r"url\(|@import", page.source[: page.source.index("</style>")])
    assert "fetch(" not in page.scripts[""]
    assert "import(" not in page.scripts[""]


def test_several_runs(run: Path, tmp_path: Path) -> None:
    """Drawn over each other, told apart by their folders where the names are equal; what differs is listed."""
    other = full_run(tmp_path / "other", rate=0.05)
    (other / "config.1.yaml").write_text((other / "config.yaml").read_text().replace("lr: 0.05", "lr: 0.01"))
    (other / "router.jsonl").unlink()
    lines(other / "metrics.jsonl", records()[:7])
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


def test_contents(run: Path, tmp_path: Path) -> None:
    """A link to each section, in its order; names are told apart where titles are alike."""
    other = full_run(tmp_path / "other", name="mine!")
    page = Page(write_report([run, other]))
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert links == ["#" + attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert len(set(links)) == len(links)
    assert links[:2] == ["#summary", "#loss"]
    assert [link for link in links if "routers" in link] == ["#routers-by-layer-mine", "#routers-by-layer-mine-7"]


def test_steps_stand_above_tokens(run: Path, tmp_path: Path) -> None:
    """At the tokens of each; left out where two runs come to a step at other tokens."""
    above = Page(write_report([run])).figures["Loss"]["layout"]["xaxis2"]
    assert (above["tickvals"], above["ticktext"]) == ([500, 1000], ["5", "10"])
    other = full_run(tmp_path / "other")
    assert "xaxis2" in Page(write_report([run, other], tmp_path / "r.html")).figures["Loss"]["layout"]
    lines(other / "metrics.jsonl", [record | {"tokens": 99 * record["step"]} for record in records()])
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
    """Few round steps, each at its tokens: 3 a step, and 7 from the step 1000 on."""
    columns = Columns()
    for step in steps:
        columns.add(step, {"tokens": 3 * step + 4 * max(0, step - 1000)})
    ticks = axes.step_axis([columns])
    assert [label for _, label in ticks] == labels
    for place, label in ticks:
        step = int(label.replace(",", ""))
        assert place == 3 * step + 4 * max(0, step - 1000)


def test_records_without_tokens() -> None:
    """A validation before the first step is at 0; another stands between its neighbours."""
    columns = Columns()
    for step, tokens in ((0, None), (1, 10), (2, None), (4, 70)):
        columns.add(step, {"loss": 1.0} if tokens is None else {"loss": 1.0, "tokens": tokens})
    assert axes.positions(columns).tolist() == [0, 10, 30, 70]


def test_a_step_before_the_first(run: Path) -> None:
    """A record of a continued model that holds its validation alone."""
    lines(run / "metrics.jsonl", [{"step": 0, "validation_loss.held_out": 3.5}, *records()])
    page = Page(write_report([run]))
    drawn = page.curves("Loss")
    assert [axis[0] for axis in drawn["validation held_out"]] == [0, 3.5]
    assert drawn["training"][0][0] == 100
    assert page.row("loss, last step") == [f"{records()[-1]['loss']:.4g}"]


def test_few_points_are_points(run: Path) -> None:
    """Up to 10 without a line, up to 60 with both."""
    assert [mode(points) for points in (1, 10, 11, 60, 61)] == [
        "markers", "markers", "lines+markers", "lines+markers", "lines",
    ]  # fmt: skip
    lines(run / "metrics.jsonl", records()[:1])
    figure = Page(write_report([run])).figures["Loss"]
    assert [trace["mode"] for trace in figure["data"] if trace["meta"] == "training"] == ["markers"]


def test_charts_without_information(run: Path) -> None:
    """What was 0 in every step and layer is named, and not drawn."""
    none = {"dead_experts": 0.0, "z_loss": 0.0, "sequence_loss": 0, "checkpoint_seconds": 0.0}
    lines(run / "metrics.jsonl", [record | none for record in records()])
    lines(
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


def test_samples(run: Path) -> None:
    """Every prompt after some of the steps, the newest first; a broken line is counted."""
    made = [
        {"step": step, "tokens": step, "prompt": f"p{n}", "text": f" {step}\n{n}"}
        for step in range(1, 12)
        for n in (1, 2)
    ]
    lines(run / "samples.jsonl", [*made, {"step": 3, "prompt": 4, "text": ""}])
    page = Page(write_report([run]))
    assert [row for row in page.rows if len(row) == 3 and row[1] in ("p1", "p2")] == [
        [str(step), f"p{n}", f" {step}\n{n}"] for step in (11, 9, 7, 5, 3, 1) for n in (1, 2)
    ]
    assert "6 of 11 steps" in page.text
    assert "1 line of samples.jsonl cannot be read" in page.text


def test_entropy_of_what_cannot_be_counted(uninterrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, URLs and large sets have none; the training mixture has one where no phase changes it."""
    config = load_config(uninterrupted / "config.yaml")
    config.data.phases = []
    assert set(unigram.unigram_entropies(config)) == {"training", "validation held_out"}
    monkeypatch.setattr(unigram, "MOST_TOKENS", 1)
    assert unigram.unigram_entropies(config) == {}
    config.data.train, config.data.validation = {"a": "s3://bucket/shards"}, {"b": "mine.txt"}
    assert unigram.unigram_entropies(config) == {}


def test_long_runs_are_thinned(run: Path) -> None:
    """At most 2000 points a curve, and no peak is lost; the page says so."""
    many = [{"step": step, "tokens": step, "grad_norm": 1 + step % 7 / 10} for step in range(1, 20_001)]
    many[12_345]["grad_norm"], many[678]["grad_norm"] = 99.0, 0.001
    lines(run / "metrics.jsonl", many)
    page = Page(write_report([run]))
    tokens, norms = page.curves("Gradient norm before clipping")["norm"]
    assert len(tokens) <= 2000
    assert (12_346, 99.0) in zip(tokens, norms)
    assert (679, 0.001) in zip(tokens, norms)
    assert tokens == sorted(set(tokens))
    assert "Thinned to 2000 points a curve." in page.text


def test_thin_keeps_what_is_short() -> None:
    """All finite points, in order."""
    assert thin(np.array([1.0, np.nan, 3.0, np.inf])).tolist() == [0, 2]
    assert thin(np.array([])).tolist() == []


def test_smooth_is_the_recursion() -> None:
    """m ← m + (y − m)/span with span = min(N/100, 1 + i/10); NaN leaves it as it is."""
    y = np.random.default_rng(0).normal(size=500)
    y[[0, 7]] = np.nan
    smoothed, longest = smooth(y)
    mean, expected = y[1], [y[1]]
    for index in range(2, 500):
        mean = mean if index == 7 else mean + (y[index] - mean) / min(5, 1 + index / 10)
        expected.append(mean)
    assert np.isnan(smoothed[0])
    assert smoothed[1:].tolist() == expected
    assert longest == 5


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda run: [run / "nowhere"], "nowhere is not a folder; give a run directory"),
        (lambda run: [run.parent], "is not a run directory: it has neither config.yaml nor metrics.jsonl"),
        (lambda run: (run / "metrics.jsonl").unlink(), "has no metrics.jsonl yet"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1, '), "holds no step yet"),
        (lambda run: [run, run / ".." / run.name], "is given twice"),
        (lambda run: (run / "report.html").write_text("<p>mine"), "is there and is not a report"),
        (lambda run: (run / "report.html").mkdir(), "is a folder; name an HTML file"),
    ],
)
def test_mistakes(run: Path, spoil: Callable, sentence: str) -> None:
    """One sentence, and no file is changed."""
    named = spoil(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=re.escape(sentence)):
        write_report(named if isinstance(named, list) else [run])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_other_files_are_safe(run: Path) -> None:
    """--out with the name of a record is a mistake; a report may be replaced."""
    with pytest.raises(UserError, match=r"must end in \.html"):
        write_report([run], run / "metrics.jsonl")
    first = write_report([run]).read_bytes()
    assert write_report([run]).read_bytes()[:100] == first[:100]


def test_without_plotly(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence says what to install."""
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UserError, match=r'pip install "trinity-moe\[report\]"'):
        write_report([run])


def test_command_line(run: Path, tmp_path: Path, run_command: Callable) -> None:
    """It prints where the report is; a mistake is exit 2 and one line."""
    done = run_command("tools/report.py", run, "--out", tmp_path / "r.html")
    assert (done.code, done.output, done.errors) == (0, f"{tmp_path / 'r.html'}\n", "")
    wrong = run_command("tools/report.py", tmp_path / "none")
    assert (wrong.code, wrong.output, wrong.errors.count("\n")) == (2, "", 1)


def test_in_a_browser(run: Path, tmp_path: Path) -> None:
    """Headless Chromium, without a network, draws every figure and fills the legends."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if browser is None:
        pytest.skip("no Chromium")
    lines(run / "metrics.jsonl", [{**one, "lr_muon": 1e-5 * one["step"], "lr_adamw": 1e-5} for one in records()])
    report = write_report([run])
    told = subprocess.run(
        [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=400,30000", "--virtual-time-budget=20000",
            "--dump-dom", report.as_uri(),
        ],
        capture_output=True, text=True, timeout=100,
    ).stdout  # fmt: skip
    page = Page(report)
    assert len(page.figures) == len(CHARTS) + 5
    assert told.count('class="figure js-plotly-plot"') == len(page.figures)
    assert ">1e−4<" in told  # a tick
    assert "µ</text>" not in told
    assert told.count('<g class="x2tick">') >= 2 * 20  # two ticks of the step axis in each chart
    assert re.search(r"<button><svg[^>]*>.*?</svg>validation held_out</button>", told)
    assert re.search(r"<button><span[^>]*>▲ </span>spike</button>", told)
