"""Wrong searches: one sentence each, and nothing written."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.malformed.refusals import refusal
from tests.merging.conftest import child, recipe, write_recipe
from tests.merging.test_tools import call
from trinity.data.tokenizer.tokenizer import save_tokenizer, train_tokenizer
from trinity.interop import export_hf
from trinity.merging.search.run_search import Search
from trinity.merging.search.search_file import merge_back, read_search

WEIGHT = {"parameter": "weight", "between": [0, 1]}
TEXT = {"name": "x", "text": "text.txt"}
CASES: dict[str, tuple[dict, str]] = {
    "no search": ({"search": None}, "write vary, objectives and budget below it"),
    "unknown key": ({"serach": {}}, "unknown key 'serach'"),
    "unknown word": ({"+variables": []}, "search has the unknown key 'variables'"),
    "nothing varies": ({"+vary": []}, "search.vary is []: nothing varies"),
    "equal bounds": ({"+vary": [WEIGHT | {"between": [1, 1]}]}, "nothing varies"),
    "no bounds": ({"+vary": [{"parameter": "weight"}]}, "write the bounds, [low, high]"),
    "bounds outside": ({"+vary": [{"parameter": "density", "between": [0, 2]}]}, "must be between 0 and 1"),
    "unknown parameter": ({"+vary": [WEIGHT | {"parameter": "wieght"}]}, "did you mean weight?"),
    "a word": ({"+vary": [WEIGHT | {"parameter": "normalize"}]}, "normalize is no real number"),
    "unknown part": ({"+vary": [WEIGHT | {"parts": ["atention"]}]}, "did you mean attention?"),
    "unknown model": ({"+vary": [WEIGHT | {"models": ["c"]}]}, "search.vary[0].models names 'c'"),
    "models of lambda": (
        {"+vary": [{"parameter": "lambda", "between": [0, 1], "models": ["a"]}]}, "lambda is of the whole merge",
    ),
    "too many blocks": ({"+vary": [WEIGHT | {"blocks": 6}]}, "blocks is 6; write at most 5"),
    "start outside": ({"+vary": [WEIGHT | {"start": 2}]}, "start is 2; it must be between 0 and 1"),
    "varied twice": ({"+vary": [WEIGHT, WEIGHT]}, "varied by another entry already"),
    "no effect": ({"rules": [{"match": ".", "parameters": {"weight": 1}}]}, "changes no tensor"),
    "no merge at a bound": (
        {"merge_method": "della", "+vary": [{"parameter": "density", "between": [0.05, 0.9], "start": 0.5}]},
        "density of a at 0.05: density 0.05 ± epsilon 0.15",
    ),
    "budget 0": ({"+budget": {"trials": 0}}, "search.budget.trials is 0; write a whole number of at least 1"),
    "minutes 0": ({"+budget": {"minutes": 0}}, "search.budget.minutes is 0; it must be above 0"),
    "no budget": ({"+budget": {}}, "write {trials: 200} or {minutes: 30}"),
    "null budget": ({"+budget": {"trials": None}}, "write {trials: 200} or {minutes: 30}"),
    "no objective": ({"+objectives": []}, "search.objectives is []"),
    "weights 0": ({"+objectives": [TEXT | {"weight": 0}]}, "give at least one of them a weight above 0"),
    "negative weight": ({"+objectives": [TEXT | {"weight": -1}]}, "it must be at least 0"),
    "same name": ({"+objectives": [TEXT, TEXT]}, "names x twice"),
    "text and task": ({"+objectives": [TEXT | {"task": "t"}]}, "exactly one of text: and task:"),
    "unknown metric": ({"+objectives": [TEXT | {"metric": "los"}]}, "did you mean loss?"),
    "no text": ({"+objectives": [TEXT | {"text": "gone.txt"}]}, "gone.txt"),
    "no lm-eval": ({"+objectives": [{"name": "x", "task": "arc_easy"}]}, 'pip install "trinity-moe[evaluation]"'),
    "population 1": ({"+population": 1}, "search.population is 1; write a whole number of at least 2"),
    "rows": ({"+evaluation": {"rows": 0}}, "search.evaluation.rows is 0; write a whole number of at least 1"),
    "window": ({"+evaluation": {"window": 65}}, "more than the 64 positions of base; write window: 64 or less"),
    "no weight elsewhere": (
        {"models": [{"model": "a"}], "+vary": [WEIGHT | {"parts": ["router"]}]}, "ties needs a weight for a",
    ),
    "no model": ({"models": [{"model": "gone"}]}, "gone does not exist"),
    "unknown method": ({"merge_method": "tise"}, "did you mean ties?"),
}  # fmt: skip


@pytest.fixture
def folder(family: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRINITY_CACHE", str(family.parent / "cache"))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (family / "text.txt").write_text("the rain in Spain " * 30)
    return family


def content(**changes: Any) -> dict:
    """A search with changes; those that begin with + are below `search`."""
    search = {"vary": [WEIGHT], "objectives": [TEXT], "budget": {"trials": 3}, "evaluation": {"window": 16}}
    search |= {key[1:]: value for key, value in changes.items() if key[0] == "+"}
    made = recipe("ties", "ab", True) | {"search": search}
    return made | {key: value for key, value in changes.items() if key[0] != "+"}


@pytest.mark.parametrize("name", CASES)
def test_refused(folder: Path, name: str) -> None:
    changes, words = CASES[name]
    sentence = refusal(lambda: Search(read_search(content(**changes)), folder / "out"), folder)
    assert words in sentence, sentence


def test_sources_and_texts_that_do_not_fit(folder: Path) -> None:
    """Another architecture; token shards and models of another tokenizer; a tokenizer that the merge makes."""
    export_hf(child(0, experts=4), folder / "small", folder / "base")
    models = [{"model": "a"}, {"model": "small"}]
    sentence = refusal(lambda: Search(read_search(content(models=models)), folder / "out"), folder)
    assert "different architectures: experts is 6 and 4" in sentence
    save_tokenizer(train_tokenizer(["quite other words, and not one of rain"] * 3, 280), folder / "other")
    assert call("prepare_data.py", "--input", "text.txt", "--tokenizer", "other", "--out", "shards") == 0
    objectives = [TEXT | {"text": "shards"}]
    sentence = refusal(lambda: Search(read_search(content(**{"+objectives": objectives})), folder / "out"), folder)
    assert "shards was made with another tokenizer than" in sentence
    export_hf(child(2), folder / "foreign", folder / "other")
    models = [{"model": "a"}, {"model": "foreign"}]
    tokenizer = {"source": "union"}
    sentence = refusal(lambda: Search(read_search(content(models=models, tokenizer=tokenizer)), folder / "o"), folder)
    assert "the recipe makes a new tokenizer" in sentence


def test_folder(folder: Path) -> None:
    """A folder with something else, a file, a folder that another search writes, and texts that changed since."""
    (folder / "full").mkdir()
    (folder / "full/notes.txt").write_text("mine")
    for place, words in (("full", "holds no search"), ("text.txt", "is a file")):
        assert words in refusal(lambda place=place: Search(read_search(content()), folder / place), folder)
    Search(read_search(content()), folder / "out").run()
    (folder / "text.txt").write_text("the rain in Spain, " * 30)
    sentence = refusal(lambda: Search(read_search(content()), folder / "out"), folder)
    assert "the texts changed since" in sentence


def test_command_line(folder: Path, capsys: pytest.CaptureFixture) -> None:
    write_recipe(folder / "s.yaml", content(**{"+vary": [WEIGHT | {"models": ["a"]}]}))
    back = ("--merge-back", "base", "a", "out")
    for words, message in (
        (("s.yaml",), "give SEARCH.yaml OUT_DIR"),
        (("s.yaml", "out", "--rows", 3), "--rows is for --merge-back"),
        (("s.yaml", "out", "--trials", 0), "--trials is for --merge-back"),
        (("s.yaml", "out", "--workers", 0), "--workers 0 must be at least 1"),
        (("s.yaml", "out", "--device", "no"), "--device no is not available"),
        (("gone.yaml", "out"), "the search gone.yaml does not exist"),
        (back, "--merge-back needs texts"),
        ((*back, "--validation", "text.txt"), "write --validation NAME=TEXT"),
        ((*back, "--validation", "x=text.txt", "--trials", 0), "--trials 0 must be at least 1"),
        ((*back, "--validation", "x=text.txt", "--window", 0), "--window 0 must be at least 1"),
        ((*back, "--validation", "x=text.txt", "--weights", "y=1"), "--weights names 'y'"),
        ((*back, "--validation", "x=text.txt", "--weights", "x=many"), "is no number"),
        ((*back, "--validation", "x=text.txt", "--weights", "x=-1"), "--weights x=-1 must be at least 0"),
        (("s.yaml", *back, "--validation", "x=text.txt"), "takes no search file"),
        (("--merge-back", "a", "a", "out", "--validation", "x=text.txt"), "--merge-back names a twice"),
    ):
        assert call("search_merge.py", *words) == 2, words
        error = capsys.readouterr().err
        assert message in error, (words, error)
        assert error.count("\n") == 1, error
        assert not (folder / "out").exists()


def test_merge_back_is_a_search_file() -> None:
    """With weights and bounds that read_search accepts."""
    made = read_search(merge_back("base", "a", {"old": "o", "new": "n"}, {"new": 0.5}, by_part=True, trials=9))
    assert [(each.name, each.weight) for each in made.objectives] == [("old", 1.0), ("new", 0.5)]
    assert made.vary[0].parts == ["attention", "experts", "router", "rest"]
    assert made.trials == 9
