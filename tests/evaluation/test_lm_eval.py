"""What lm-eval is asked for and what is made of its answer, with a stand-in for the package; and its absence."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trinity.errors import Failure, UserError
from trinity.evaluation.lm_eval import run_tasks

ANSWER = {"results": {"arc_easy": {"alias": "arc_easy", "acc,none": 0.25, "acc_stderr,none": 0.04, "em,strict": 1}}}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Puts a package that knows the task arc_easy where lm_eval is looked for; returns what it was asked."""
    asked: dict[str, Any] = {}

    class TaskManager:
        def __init__(self, include_path: str | None) -> None:
            asked["include_path"] = include_path

        def match_tasks(self, names: list[str]) -> list[str]:
            return [name for name in names if name == "arc_easy"]

    def simple_evaluate(**words: Any) -> dict:
        asked.update(words)
        if words["limit"] == 13:
            raise ConnectionError("no\nroute")
        return ANSWER

    package, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    package.simple_evaluate, tasks.TaskManager = simple_evaluate, TaskManager
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    return asked


def test_what_is_asked_and_answered(asked: dict[str, Any]) -> None:
    """Figures without lm-eval's mark of the filter that filters nothing; texts are no figures."""
    found = run_tasks(Path("out/hf"), ["arc_easy"], limit=7, window=512, task_folder=Path("mine"))
    assert found == {"arc_easy": {"acc": 0.25, "acc_stderr": 0.04, "em,strict": 1}}
    model = {"pretrained": "out/hf", "dtype": "float32", "add_bos_token": True, "max_length": 512}
    assert asked["model_args"].items() >= model.items()
    assert (asked["model"], asked["tasks"], asked["limit"]) == ("hf", ["arc_easy"], 7)
    assert asked["include_path"] == "mine"


def test_what_goes_wrong(asked: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--tasks arc_hard is not known to lm-eval"):
        run_tasks(Path("out/hf"), ["arc_easy", "arc_hard"])
    assert "tasks" not in asked
    with pytest.raises(Failure, match=r"could not get what its tasks need \(no route\)"):
        run_tasks(Path("out/hf"), ["arc_easy"], limit=13)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"needs lm-eval; install it: pip install \"trinity-moe\[evaluation\]\""):
        run_tasks(Path("out/hf"), ["arc_easy"])
