"""tools/merge.py --report, --validation, --recalibrate as a user calls them."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.interop.small_model import CONFIG
from tests.malformed.refusals import refusal
from tests.merging.conftest import child, recipe, tensors_of, write_recipe
from tests.merging.test_sources import make_run
from tests.merging.test_tools import call
from tests.reporting.page_reader import Page, array
from trinity.data.tokenizer.tokenizer import save_tokenizer, train_tokenizer
from trinity.interop import export_hf, load_hf
from trinity.merging import recalibrate
from trinity.merging.recipe import read_recipe
from trinity.merging.validation import RowSettings
from trinity.reporting import after_merge
from trinity.reporting.after_merge import AfterMerge, merge_and_measure

ROWS = ("--window", 32, "--batch-tokens", 128)
TEXT, PROSE = "rain.jsonl", "prose.jsonl"


@pytest.fixture
def folder(family: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The family with a recipe and two texts."""
    monkeypatch.setenv("TRINITY_CACHE", str(family.parent / "cache"))
    write_recipe(family / "recipe.yaml", recipe("ties", "ab", base=True))
    lines = [f"the rain in Spain stays mainly in the plain, {number * 7919 % 1000} drops" for number in range(12)]
    for name, texts in ((TEXT, lines), (PROSE, [line[::-1] for line in lines])):
        (family / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return family


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_figures_are_those_of_evaluate(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Of a text and of the shards that prepare_data makes of it, for every model and the merged one, to the last digit
    of the table."""
    assert call("prepare_data.py", "--tokenizer", "base", "--input", PROSE, "--out", "shards") == 0
    sets = {"rain": TEXT, "prose": "shards"}
    words = ["--validation", *(f"{name}={path}" for name, path in sets.items())]
    assert call("merge.py", "recipe.yaml", "out", "--report", "r.html", *words, *ROWS, "--rows", 5) == 0
    count = len(tensors_of(folder / "base"))
    assert capsys.readouterr().out.splitlines()[-1] == f"{3 * count} tensors read, {count} written, 0 dropped"
    page = Page(folder / "r.html")
    found = {name: page.row(name) for row in page.rows if (name := row[0]).startswith(("rain:", "prose:"))}
    titles = {"loss": "loss, nats per token", "bits_per_byte": "bits per byte", "max_violation": "MaxVio, worst layer",
              "max_violation_mean": "MaxVio, mean of the layers", "dead_experts": "dead experts, share"}  # fmt: skip
    assert len(found) == 2 * len(titles)
    models = next(row for row in page.rows if row[-1] == "merged model" and "a" in row and len(row) == 5)[1:]
    assert sorted(models) == ["a", "b", "base", "merged model"]
    for column, model in enumerate(models):
        place = "out" if model == "merged model" else model
        assert call("evaluate.py", place, "--text", *sets.values(), "--packed", *ROWS, "--limit", 5, "--json", "f") == 0
        results = json.loads((folder / "f").read_text())["results"]
        for name, path in sets.items():
            for key, title in titles.items():
                assert found[f"{name}: {title}"][column] == f"{results[f'packed {path}'][key]:.6g}"
            _, violation = page.curves(f"MaxVio by layer, {name}")[model]
            assert max(violation) == results[f"packed {path}"]["max_violation"]
    heatmap = page.figures["Relative difference of merged model"]["data"][0]
    assert len(array(heatmap["z"])) == len(heatmap["y"]) == 17
    assert len(array(heatmap["z"])[0]) == CONFIG.layers


def test_report_of_a_merged_folder(folder: Path) -> None:
    """--no-merge gives the page of the merge itself, and leaves the folder as it is."""
    assert call("merge.py", "recipe.yaml", "out", "--report", "first.html", "--validation", f"rain={TEXT}", *ROWS) == 0
    before = contents(folder / "out")
    words = ("--no-merge", "--report", "second.html", "--validation", f"rain={TEXT}", *ROWS)
    assert call("merge.py", "recipe.yaml", "out", *words) == 0
    assert contents(folder / "out") == before
    first, second = (re.sub(r"Made [^.]*\.", "", (folder / f"{name}.html").read_text()) for name in ("first", "second"))
    assert first == second


@pytest.mark.parametrize("routers", [False, True])
def test_recalibrated_folder(folder: Path, routers: bool, capsys: pytest.CaptureFixture) -> None:
    """The same bytes in one command and after a plain merge; only biases and routers differ from that."""
    write_recipe(folder / "recipe.yaml", recipe("ties", "ab", base=True, rules=[{"match": "expert_bias", "parameters": {
        "lambda": 3.0}}]))  # fmt: skip
    texts = (f"a={TEXT}", f"b={PROSE}")
    words = ("--recalibrate", *texts, *(["--recalibrate-routers"] if routers else []), *ROWS, "--rows", 4)
    assert call("merge.py", "recipe.yaml", "first", "--shard-bytes", "1e5", *words) == 0
    output = capsys.readouterr().out
    assert call("merge.py", "recipe.yaml", "third", "--shard-bytes", "1e5") == 0
    plain, files = tensors_of(folder / "third"), contents(folder / "third")
    assert call("merge.py", "recipe.yaml", "third", "--no-merge", *words) == 0
    assert contents(folder / "first") == contents(folder / "third")
    assert {path.name for path in folder.iterdir() if path.name.startswith(".")} == set()
    assert contents(folder / "first").keys() - files.keys() == {"recalibration.json"}
    changed = {name for name, tensor in tensors_of(folder / "first").items() if not torch.equal(tensor, plain[name])}
    endings = ("expert_bias", "router.gate.weight") if routers else ("expert_bias",)
    assert changed == {name for name in plain if name.endswith(endings)}
    count = len(plain)
    lines = output.splitlines()
    assert lines[-1] == f"{3 * count} tensors read, {count} written, 0 dropped"
    assert f"{len(changed)} tensors rewritten, 3 expert biases and {len(changed) - 3} routers" in output
    record = json.loads((folder / "first" / "recalibration.json").read_text())
    both = [[figures["max_violation_mean"] for figures in record[when].values()] for when in ("before", "after")]
    assert sum(both[1]) < sum(both[0])
    for path in (TEXT, PROSE):
        assert call("evaluate.py", "first", "--text", path, "--packed", *ROWS, "--limit", 4, "--json", "f") == 0
        results = json.loads((folder / "f").read_text())["results"][f"packed {path}"]
        assert record["after"][path] == results
        before, after = (record[when][path]["loss"] for when in ("before", "after"))
        assert f"{path}: loss: {before:.6g} before, {after:.6g} after" in lines
    load_hf(folder / "first")


def test_page_of_a_recalibration(folder: Path) -> None:
    """Figures before and after, beside the models."""
    words = ("--report", "r.html", "--validation", f"rain={TEXT}", "--recalibrate", TEXT, *ROWS, "--rows", 4)
    assert call("merge.py", "recipe.yaml", "out", *words) == 0
    page = Page(folder / "r.html")
    before, after = page.row("rain: MaxVio, mean of the layers")[-2:]
    assert page.row(f"{TEXT}: MaxVio, mean of the layers") == [before, after]
    assert float(after) < float(before)


def test_killed_recalibration(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder has no name before it is recalibrated; the same command gives the same bytes afterwards."""
    checked, after = read_recipe(folder / "recipe.yaml"), AfterMerge(recalibrate=[TEXT], rows=RowSettings(32, 4))
    merge_and_measure(checked, folder / "undisturbed", after)
    with monkeypatch.context() as patched:
        patched.setattr(recalibrate, "rewrite_tensors", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            merge_and_measure(checked, folder / "out", after)
    assert not (folder / "out").exists()
    merge_and_measure(checked, folder / "out", after)
    assert contents(folder / "out") == contents(folder / "undisturbed")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_rule_of_a_run(folder: Path, tokenizer: Path) -> None:
    """The run that gives the config says how its biases move; --balancing overrides it."""
    run = make_run(folder / "run", tokenizer)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("kind: smebu", "kind: sign"))
    models = [{"model": f"run@{step}", "parameters": {"weight": 1}} for step in (2, 4)]
    checked = read_recipe({"merge_method": "linear", "models": models})
    for rule, expected in ((None, "sign"), ("smebu", "smebu")):
        after = AfterMerge(recalibrate=[f"run@2={TEXT}"], routers=True, rule=rule, rows=RowSettings(32, 4))
        merge_and_measure(checked, folder / expected, after)
        assert json.loads((folder / expected / "recalibration.json").read_text())["rule"] == expected


def other_vocabulary(folder: Path) -> None:
    save_tokenizer(train_tokenizer(["another text with other words"] * 2, 270), folder / "other")
    assert call("prepare_data.py", "--tokenizer", "other", "--input", TEXT, "--out", "shards") == 0


def dense(folder: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        export_hf(child(seed, dense_layers=5), folder / name, folder / "c", torch.float32, overwrite=True)


def stack(folder: Path) -> None:
    part = [{"sources": [{"model": "a", "layer_range": [0, 3]}]}, {"sources": [{"model": "b", "layer_range": [2, 5]}]}]
    write_recipe(folder / "recipe.yaml", {"merge_method": "passthrough", "slices": part})


def with_match(folder: Path) -> None:
    write_recipe(folder / "recipe.yaml", recipe("linear", "ab", match_experts=True))


def without_tokenizer(folder: Path) -> None:
    for name in ("base", "a", "b"):
        (folder / name / "tokenizer.json").unlink()


def nothing(folder: Path) -> None:
    pass


REPORT = ("--report", "r.html")
WRONG: list[tuple[Callable[[Path], None], tuple, str]] = [
    (other_vocabulary, (*REPORT, "--validation", "x=shards"), "--validation shards was made with another tokenizer"),
    (other_vocabulary, ("--recalibrate", "shards"), "--recalibrate shards was made with another tokenizer"),
    (nothing, (*REPORT, "--validation", "x=nowhere"), "nowhere"),
    (nothing, ("--recalibrate", "nowhere.jsonl"), "nowhere.jsonl"),
    (dense, ("--recalibrate", TEXT), "base has no MoE layers, so no biases to recalibrate; omit --recalibrate"),
    (nothing, (*REPORT, "--validation", TEXT), f"--validation {TEXT} is not understood; write --validation NAME=TEXT"),
    (nothing, (*REPORT, "--validation", f"x={TEXT}", f"x={PROSE}"), "--validation names x twice"),
    (nothing, ("--validation", f"x={TEXT}"), "--validation is for the report; give --report FILE.html, too"),
    (nothing, ("--report", "r.txt"), "--report r.txt must end in .html"),
    (nothing, ("--report", "a/config.html", "--recalibrate", f"q={TEXT}"), "q is none of the models; they are a, b"),
    (nothing, ("--recalibrate", TEXT, TEXT), f"--recalibrate names {TEXT} twice"),
    (nothing, ("--recalibrate-routers",), "--recalibrate-routers needs texts; give --recalibrate MODEL=TEXT"),
    (nothing, ("--recalibrate", TEXT, "--recalibrate-routers"), f"write --recalibrate MODEL={TEXT} with one of a, b"),
    (with_match, ("--recalibrate", f"a={TEXT}", "--recalibrate-routers"), "the recipe has slices or match_experts"),
    (stack, ("--recalibrate", TEXT), "layer_types is not full_attention in every layer"),
    (without_tokenizer, ("--recalibrate", TEXT), "--recalibrate needs a tokenizer, and base has no tokenizer.json"),
    (nothing, (*REPORT, "--window", 0), "--window 0 must be at least 1"),
    (nothing, (*REPORT, "--device", "cuda:99"), "--device cuda:99 is not available; use cpu"),
    (nothing, ("--no-merge", *REPORT), "is no merged folder: it has no merge_recipe.yaml; merge without --no-merge"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "words", "sentence"), WRONG)
def test_mistakes(folder: Path, capsys: pytest.CaptureFixture, spoil: Callable, words: tuple, sentence: str) -> None:
    """Each is refused with one sentence before anything is written."""
    spoil(folder)
    capsys.readouterr()

    def run() -> None:
        assert call("merge.py", "recipe.yaml", "out", *words) == 2
        error = capsys.readouterr().err
        raise after_merge.UserError(error.removeprefix("error: ").strip())

    assert sentence in refusal(run, folder)


def test_no_merge_mistakes(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Without anything to do; and with another recipe than the folder's."""
    assert call("merge.py", "recipe.yaml", "out") == 0
    assert call("merge.py", "recipe.yaml", "out", "--no-merge") == 2
    assert "--no-merge leaves nothing to do; give --report or --recalibrate, too" in capsys.readouterr().err
    write_recipe(folder / "recipe.yaml", recipe("linear", "ab"))
    assert call("merge.py", "recipe.yaml", "out", "--no-merge", "--report", "r.html") == 2
    assert "was merged by another recipe" in capsys.readouterr().err
    write_recipe(folder / "recipe.yaml", recipe("ties", "ab", base=True))
    (folder / "out" / "notes").mkdir()
    assert call("merge.py", "recipe.yaml", "out", "--no-merge", "--recalibrate", TEXT) == 2
    assert "out holds the folder notes" in capsys.readouterr().err
    assert (folder / "out" / "notes").is_dir()
    assert not (folder / ".out.partial").exists()


def test_dry_run(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Checks the texts, says what memory a model takes, and writes nothing."""
    words = ("recipe.yaml", "out", "--dry-run", "--report", "r.html", "--validation")
    assert call("merge.py", *words, "x=nowhere.jsonl") == 2
    assert call("merge.py", *words, f"x={TEXT}") == 0
    size = sum(tensor.numel() for tensor in tensors_of(folder / "base").values()) * 4 / 1e9
    assert f"one whole model at a time: {size:.2f} GB" in capsys.readouterr().out
    assert not (folder / "out").exists()
    assert not (folder / "r.html").exists()


def test_report_needs_plotly(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    after = AfterMerge(report=folder / "r.html")
    checked = read_recipe(folder / "recipe.yaml")
    assert "needs plotly" in refusal(lambda: merge_and_measure(checked, folder / "out", after), folder)


def test_source_with_another_tokenizer(folder: Path, tokenizer: Path) -> None:
    """A text is read with each model's own tokenizer; shards are left out for a model that cannot read them."""
    save_tokenizer(train_tokenizer(["another text with other words"] * 2, 270), folder / "other")
    export_hf(child(2), folder / "b", folder / "other", torch.float32, overwrite=True)
    assert call("prepare_data.py", "--tokenizer", tokenizer, "--input", PROSE, "--out", "shards") == 0
    write_recipe(folder / "recipe.yaml", recipe("linear", "ab", tokenizer={"source": "a"}))
    words = ("--report", "r.html", "--validation", f"rain={TEXT}", "prose=shards", *ROWS)
    assert call("merge.py", "recipe.yaml", "out", *words) == 0
    page = Page(folder / "r.html")
    assert page.row("prose: loss, nats per token")[1] == "–"
    assert "shards was made with another tokenizer than b" in page.text
    assert call("evaluate.py", "b", "--text", TEXT, "--packed", *ROWS, "--json", "f") == 0
    expected = json.loads((folder / "f").read_text())["results"][f"packed {TEXT}"]["bits_per_byte"]
    assert page.row("rain: bits per byte")[1] == f"{expected:.6g}"


def test_labels_are_never_markup(folder: Path) -> None:
    """A model's path appears unchanged, and adds no tag."""
    name = "<img src=x>&amp;"
    (folder / "b").rename(folder / name)
    content = recipe("linear", "a")
    content["models"].append({"model": name, "parameters": {"weight": 1}})
    write_recipe(folder / "recipe.yaml", content)
    assert call("merge.py", "recipe.yaml", "out", "--report", "r.html") == 0
    page = Page(folder / "r.html")
    assert name in page.row("models")[0]
    assert "img" not in [tag for tag, _ in page.tags]
