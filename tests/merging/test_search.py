"""Searches as a user runs them: planted optima, interruption, the best recipe repeated, lm-eval, the merge back."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.merging.conftest import recipe, write_recipe
from tests.merging.test_faults import in_child
from tests.merging.test_tools import call
from tests.reporting.page_reader import Page
from trinity.errors import UserError
from trinity.evaluation import lm_eval
from trinity.interop import load_hf
from trinity.merging import merge
from trinity.merging.search import objectives, run_search
from trinity.merging.search.objectives import Objectives
from trinity.merging.search.optimizers import CmaEs, LineSearch
from trinity.merging.search.run_search import Search
from trinity.merging.search.search_file import read_search
from trinity.models import Trinity

ROWS = {"window": 32, "rows": 3, "batch_tokens": 128}
TWO = [{"name": "rain", "text": "rain.jsonl"}, {"name": "prose", "text": "prose.jsonl", "weight": 0.5}]
WEIGHTS = {"parameter": "weight", "between": [0, 1]}


@pytest.fixture
def folder(family: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The family with two texts."""
    monkeypatch.setenv("TRINITY_CACHE", str(family.parent / "cache"))
    lines = [f"the rain in Spain stays mainly in the plain, {number * 7919 % 1000} drops" for number in range(6)]
    for name, texts in (("rain.jsonl", lines), ("prose.jsonl", [line[::-1] for line in lines])):
        (family / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return family


def content(*vary: dict, trials: int = 12, each: list[dict] = TWO, **search: Any) -> dict:
    """A search file of TIES of two models."""
    search = {"vary": list(vary), "objectives": each, "budget": {"trials": trials}, "evaluation": ROWS} | search
    return recipe("ties", "ab", True, out_dtype="bfloat16") | {"search": search}


def records(out: Path) -> list[dict]:
    """trials.jsonl without times."""
    lines = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def planted(monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
    """Make the loss the squared distance of the merged model from a folder's."""
    wanted = load_hf(target).state_dict()

    def measure(self: Objectives, model: Trinity, write: Callable | None = None) -> dict:
        distance = sum(float((tensor - wanted[name]).square().sum()) for name, tensor in model.state_dict().items())
        return {each.name: {"loss": distance} for each in self.each}

    monkeypatch.setattr(Objectives, "measure", measure)
    monkeypatch.setattr(Objectives, "measure_source", lambda self, source, model: measure(self, model))


def test_planted_mixture_along_a_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merge back finds the α of a known mixture, to the line search's 1/1000, and of each part by CMA-ES."""
    weights = [
        {"filter": "self_attn", "value": 0.8},
        {"filter": "experts.", "value": 0.35},
        {"filter": "*", "value": 0.1},
    ]
    for name, value in (("line", 0.437), ("parts", weights)):
        merge({"merge_method": "task_arithmetic", "base_model": "base",
               "models": [{"model": "a", "parameters": {"weight": value}}]}, folder / name)  # fmt: skip
    planted(monkeypatch, folder / "line")
    words = ("--validation", "x=rain.jsonl", "--window", 32)
    assert call("search_merge.py", "--merge-back", "base", "a", "one", *words) == 0
    history = json.loads((folder / "one/history.json").read_text())
    (found,) = history["trials"][history["best"]]["values"]
    assert abs(found - 0.437) <= 1e-3
    assert "converged" in history["stopped"]
    planted(monkeypatch, folder / "parts")
    assert call("search_merge.py", "--merge-back", "base", "a", "four", *words, "--by-part", "--trials", 130) == 0
    history = json.loads((folder / "four/history.json").read_text())
    best = history["trials"][history["best"]]["values"]
    # the router's share of the distance is so small that its weight is found only roughly
    for value, wanted, within in zip(best, (0.8, 0.35, 0.1, 0.1), (0.05, 0.05, 0.3, 0.05)):
        assert abs(value - wanted) < within, best


def test_a_model_that_is_better_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A short budget leaves the best merge behind one of the models, which is said; a longer one passes it."""
    merge({"merge_method": "task_arithmetic", "base_model": "base",
           "models": [{"model": "a", "parameters": {"weight": 0.9}}]}, folder / "target")  # fmt: skip
    planted(monkeypatch, folder / "target")
    words = ("--merge-back", "base", "a", "out", "--validation", "x=rain.jsonl", "--window", 32)
    for trials, named in ((1, True), (16, False)):
        assert call("search_merge.py", *words, "--trials", trials) == 0
        assert ("note: a alone has a lower cost" in capsys.readouterr().out) == named


def test_whole_search(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """The best recipe, given to tools/merge.py, makes the same bytes; evaluate.py finds the reported loss in it."""
    vary = [WEIGHTS | {"parts": ["experts", "rest"], "models": ["a"]}, {"parameter": "density", "between": [0.2, 1]}]
    write_recipe(folder / "s.yaml", content(*vary))
    assert call("search_merge.py", "s.yaml", "out", "--dry-run") == 0
    assert "variables:  4" in capsys.readouterr().out
    assert not (folder / "out").exists()
    assert call("search_merge.py", "s.yaml", "out") == 0
    output = capsys.readouterr().out
    history = json.loads((folder / "out/history.json").read_text())
    assert len(history["trials"]) == 12
    best = history["trials"][history["best"]]
    assert best["cost"] == min(trial["cost"] for trial in history["trials"])
    assert best["cost"] == best["objectives"]["rain"] + 0.5 * best["objectives"]["prose"]
    assert best["cost"] < history["trials"][0]["cost"]
    assert f"best (trial {history['best']})" in output
    assert call("merge.py", "out/best_recipe.yaml", "again") == 0
    assert bytes_of(folder / "again") == bytes_of(folder / "out/model")
    rows = ("--window", 32, "--batch-tokens", 128, "--limit", 3, "--packed", "--json", "f")
    for place, expected in (("again", best["objectives"]), ("a", history["models"]["a"])):
        assert call("evaluate.py", place, "--text", "rain.jsonl", "prose.jsonl", *rows) == 0
        results = json.loads((folder / "f").read_text())["results"]
        assert {name: results[f"packed {name}.jsonl"]["loss"] for name in expected} == expected
    fronts = {int(path.stem.removeprefix("trial_")): path for path in (folder / "out/front").iterdir()}
    assert sorted(fronts) == history["front"]
    page = Page(folder / "out/report.html")
    assert {"Cost", "rain", "prose", "Variables", "rain and prose"} <= set(page.figures)
    assert page.row("best trial") == [str(history["best"])]
    # the same command again adds nothing and changes nothing; a larger budget goes on
    before = records(folder / "out")
    assert call("search_merge.py", "s.yaml", "out") == 0
    assert records(folder / "out") == before
    write_recipe(folder / "s.yaml", content(*vary, trials=14))
    assert call("search_merge.py", "s.yaml", "out") == 0
    assert records(folder / "out")[:-2] == before
    capsys.readouterr()
    write_recipe(folder / "s.yaml", content(*vary, seed=1))
    assert call("search_merge.py", "s.yaml", "out") == 2
    assert "holds a search with another search file" in capsys.readouterr().err


@pytest.mark.parametrize("variables", [1, 2])
def test_killed_search_goes_on(folder: Path, variables: int) -> None:
    """Killed within a generation and within a line of the log: the trials are those of an undisturbed search."""
    parts = {"parts": ["experts", "rest"][:variables]}
    file = content(WEIGHTS | {"models": ["b"]} | parts, trials=14, population=4, try_first=[0, 1])
    Search(read_search(file), folder / "undisturbed").run()

    def killed(after: int) -> None:
        append = run_search.append_json_line

        def last(path: Path, record: dict) -> None:
            append(path, record)
            if record.get("trial") == after:
                with open(path, "a") as log:  # half a line, as of a write that was cut short
                    log.write('{"trial": 99, "val')
                os.kill(os.getpid(), signal.SIGKILL)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_search, "append_json_line", last)
            Search(read_search(file), folder / "out").run()

    for after in (1, 6):
        assert os.WTERMSIG(in_child(lambda after=after: killed(after))) == signal.SIGKILL
        assert not (folder / "out/model").exists()
    found = Search(read_search(file), folder / "out").run()
    assert found.new == 7
    assert [trial.record() | {"seconds": 0} for trial in found.trials] == [
        json.loads(json.dumps(trial)) | {"seconds": 0}
        for trial in json.loads((folder / "undisturbed/history.json").read_text())["trials"]
    ]
    assert bytes_of(folder / "out/model") == bytes_of(folder / "undisturbed/model")
    assert (folder / "out/best_recipe.yaml").read_bytes() == (folder / "undisturbed/best_recipe.yaml").read_bytes()
    # a log whose values are not those that are asked for is refused
    log = folder / "out/trials.jsonl"
    log.write_text(log.read_text().replace('"values": [', '"values": [0.123, ', 1))
    with pytest.raises(UserError, match="another version of cma made it"):
        Search(read_search(file), folder / "out").run()


@pytest.mark.parametrize("variables", [1, 2])
def test_values_are_tried_once(folder: Path, monkeypatch: pytest.MonkeyPatch, variables: int) -> None:
    """A repeated point is no trial, and the optimizer is told its cost; an older log, with both, goes on."""
    parts = {"parts": ["experts", "rest"][:variables]}
    file = content(WEIGHTS | {"models": ["b"]} | parts, trials=9, population=4, try_first=[0.5, 0, 0.5, 1])
    told: list[list[float]] = []
    for kind in (LineSearch, CmaEs):
        tell = kind.tell

        def record(self: Any, points: list, costs: list, tell: Callable = tell) -> None:
            told.append(costs)
            tell(self, points, costs)

        monkeypatch.setattr(kind, "tell", record)
    found = Search(read_search(file), folder / "out").run()
    values = [trial.values for trial in found.trials]
    assert values[:4] == [[share] * variables for share in (0.3, 0.5, 0.0, 1.0)]
    assert len(values) == len({tuple(each) for each in values}) == 9
    if variables == 1:  # 0, 1/2 and 1 of the grid were tried before
        cost_of = {trial.values[0]: trial.cost for trial in found.trials}
        assert told[0] == [cost_of[each] for each in (0.0, 0.166667, 0.333333, 0.5, 0.666667, 0.833333, 1.0)]
    # as a version logged it that evaluated each point anew
    log = folder / "out/trials.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    trials = [line for line in lines if "trial" in line]
    at = values.index([0.0] * variables) + 1
    trials.insert(at, trials[values.index([0.5] * variables)])
    kept = [line for line in lines if "model" in line] + [line | {"trial": k} for k, line in enumerate(trials)]
    log.write_text("".join(json.dumps(line) + "\n" for line in kept))
    file["search"]["budget"] = {"trials": 11}
    again = Search(read_search(file), folder / "out").run()
    assert again.new == 1
    assert [trial.values for trial in again.trials[: at + 2]] == [trial["values"] for trial in trials[: at + 2]]
    assert again.best.cost <= found.best.cost


def test_merge_back(folder: Path) -> None:
    """α = 0 is the base and α = 1 the continued model; the search file that is kept repeats the search."""
    words = (
        "--validation",
        "rain=rain.jsonl",
        "prose=prose.jsonl",
        "--weights",
        "prose=2",
        "--window",
        32,
        "--rows",
        3,
    )
    assert call("search_merge.py", "--merge-back", "base", "a", "out", *words, "--trials", 8) == 0
    history = json.loads((folder / "out/history.json").read_text())
    by_alpha = {trial["values"][0]: trial for trial in history["trials"]}
    assert list(by_alpha)[:7] == [0.5, 0.0, 0.166667, 0.333333, 0.666667, 0.833333, 1.0]
    assert len(by_alpha) == len(history["trials"]) == 8  # 1/2 is both the start and on the grid, and is evaluated once
    for alpha, model in ((0.0, "base"), (1.0, "a")):
        for name, loss in by_alpha[alpha]["objectives"].items():
            # base + 1·(continued - base) is the continued model but for the rounding of fp32
            assert abs(loss - history["models"][model][name]) < (1e-5 if alpha else 1e-12)
        objectives = by_alpha[alpha]["objectives"]
        assert by_alpha[alpha]["cost"] == objectives["rain"] + 2 * objectives["prose"]
    assert call("search_merge.py", "out/search.yaml", "again") == 0
    assert records(folder / "again") == records(folder / "out")


def test_tasks_of_lm_eval(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task sees the trial as a folder, with the weights that are in memory; acc is to become large."""
    seen: list[tuple] = []

    def run_tasks(place: Path, tasks: list[str], **words: Any) -> dict:
        total = float(sum(tensor.double().sum() for tensor in load_hf(place).state_dict().values()))
        seen.append((tasks, words["limit"]))
        return {tasks[0]: {"acc": total, "acc_stderr": 0.1}}

    monkeypatch.setattr(lm_eval, "run_tasks", run_tasks)
    monkeypatch.setattr(lm_eval, "known_tasks", lambda tasks: None)
    sums: list[float] = []
    original = objectives.Objectives.measure

    def measure(self: Objectives, model: Trinity, write: Callable | None = None) -> dict:
        sums.append(float(sum(tensor.double().sum() for tensor in model.state_dict().values())))
        return original(self, model, write)

    monkeypatch.setattr(Objectives, "measure", measure)
    each = [{"name": "arc", "task": "arc_easy", "limit": 7, "weight": 2}]
    found = Search(read_search(content(WEIGHTS | {"models": ["a"]}, each=each, trials=3)), folder / "out").run()
    assert [trial.objectives["arc"] for trial in found.trials] == sums
    assert [trial.cost for trial in found.trials] == [-2 * total for total in sums]
    assert seen == [(["arc_easy"], 7)] * 6
    assert not (folder / "out/trial_model").exists()
    each = [{"name": "arc", "task": "arc_easy", "metric": "f1"}]
    with pytest.raises(UserError, match="lm-eval reports no f1 for arc_easy; it reports acc, acc_stderr"):
        Search(read_search(content(WEIGHTS, each=each)), folder / "other").run()


def test_failed_trials_and_time(folder: Path) -> None:
    """Weights that sum to 0 are a trial without a model; a budget of minutes ends after the trial that spends it."""
    models = [{"model": "a"}]
    search = {"vary": [WEIGHTS | {"between": [-1, 1], "start": 0.5}], "objectives": TWO[:1], "budget": {"trials": 4},
              "evaluation": ROWS}  # fmt: skip
    file = {"merge_method": "linear", "models": models, "parameters": {"normalize": False}, "search": search}
    file |= {"rules": [{"match": "lm_head", "method": "linear", "parameters": {"normalize": True}}]}
    search |= {"try_first": [0]}
    found = Search(read_search(file), folder / "out").run()
    assert "sum to 0" in (found.trials[1].error or "")
    assert found.trials[1].cost == float("inf")
    record = json.loads((folder / "out/trials.jsonl").read_text().splitlines()[2])
    assert record["cost"] is None
    search["budget"] = {"minutes": 1e-9}
    assert len(Search(read_search(file), folder / "short").run().trials) == 1
    assert torch.isfinite(load_hf(folder / "short/model").head.weight).all()


def test_yaml_repeats_every_value(folder: Path) -> None:
    """A recipe that was written and read again has the same numbers, small ones too."""
    vary = {"parameter": "epsilon", "between": [1e-7, 1e-4]}
    search = {"vary": [vary], "objectives": TWO[:1], "budget": {"trials": 9}, "evaluation": ROWS}
    file = {"merge_method": "ram", "base_model": "base", "models": [{"model": "a"}], "search": search}
    found = Search(read_search(file), folder / "out").run()
    text = yaml.safe_load((folder / "out/best_recipe.yaml").read_text())
    assert text["parameters"]["epsilon"] == found.best.values[0]
