"""Arguments for lm-eval and metrics from its results, with a fake package; errors; and a missing package."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trinity.errors import Failure, UserError
from trinity.evaluation.lm_eval import run_tasks

ANSWER = {"results": {"arc_easy": {"alias": "arc_easy", "acc,none": 0.25, "acc_stderr,none": 0.04, "em,strict": 1}}}


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Install a fake lm_eval that knows the task arc_easy; returns the arguments that it gets."""
    arguments: dict[str, Any] = {}

    class TaskManager:
        def __init__(self, include_path: str | None) -> None:
            arguments["include_path"] = include_path

        def match_tasks(self, names: list[str]) -> list[str]:
            return [name for name in names if name == "arc_easy"]

    def simple_evaluate(**words: Any) -> dict:
        arguments.update(words)
        if words["limit"] == 13:
            raise ConnectionError("no\nroute")
        return ANSWER

    package, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    package.simple_evaluate, tasks.TaskManager = simple_evaluate, TaskManager
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    return arguments


def test_arguments_and_metrics(arguments: dict[str, Any]) -> None:
    """Metrics lose lm-eval's suffix for no filter; values that are texts are dropped."""
    metrics = run_tasks(Path("out/hf"), ["arc_easy"], limit=7, window=512, task_folder=Path("mine"))
    assert metrics == {"arc_easy": {"acc": 0.25, "acc_stderr": 0.04, "em,strict": 1}}
    model = {"pretrained": "out/hf", "dtype": "float32", "add_bos_token": True, "max_length": 512}
    assert arguments["model_args"].items() >= model.items()
    assert (arguments["model"], arguments["tasks"], arguments["limit"]) == ("hf", ["arc_easy"], 7)
    assert arguments["include_path"] == "mine"


def test_errors(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="the task arc_hard is not known to lm-eval"):
        run_tasks(Path("out/hf"), ["arc_easy", "arc_hard"])
    assert "tasks" not in arguments
    with pytest.raises(Failure, match=r"could not download the data of its tasks \(no route\)"):
        run_tasks(Path("out/hf"), ["arc_easy"], limit=13)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"needs lm-eval; install it: pip install \"trinity-moe\[evaluation\]\""):
        run_tasks(Path("out/hf"), ["arc_easy"])
