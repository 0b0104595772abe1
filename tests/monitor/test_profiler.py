"""Profiled steps leave a trace and a table and do not change the run; steps that do not exist are refused."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.training.run_files import metrics, refuse, train
from trinity.config.check import profiled_steps
from trinity.config.run import ProfileConfig
from trinity.errors import UserError
from trinity.monitor.events import Events
from trinity.monitor.profiler import Profiler


def test_a_chosen_step_leaves_a_trace(settings: dict, uninterrupted: Path, capfd: pytest.CaptureFixture) -> None:
    """Step 2: its files and no others, a complete trace with the step's operations, and unchanged metrics."""
    words = ("run.steps=3", "evaluation.every=0", "profile.steps=[2]", "profile.memory=true")
    assert train(settings, *words) == 0
    run = Path(settings["run"]["dir"])
    names = ["step_00000002.rank0.json.gz", "step_00000002.rank0.txt"]
    assert sorted(path.name for path in (run / "profile").iterdir()) == names
    trace = json.loads(gzip.decompress((run / "profile" / names[0]).read_bytes()))
    assert {"aten::mm", "trinity::route"} <= {event.get("name") for event in trace["traceEvents"]}
    table = (run / "profile" / names[1]).read_text()
    assert "aten::" in table
    assert "CPU Mem" in table
    printed = capfd.readouterr().err
    assert "step 2 on rank 0, costliest operations:\n" in printed
    assert table in printed
    assert metrics(run) == metrics(uninterrupted)[:3]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "profile"] == [2]


def test_nothing_is_profiled_by_default(settings: dict) -> None:
    """No profile, no folder; also on a rank that profile.ranks does not name."""
    assert train(settings, "run.steps=1", "profile.steps=1", "profile.ranks=[]") == 0
    assert not (Path(settings["run"]["dir"]) / "profile").exists()


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_memory_of_a_gpu_is_recorded_in_the_step_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the calls, with torch's own replaced: begin, wait, snapshot, stop; and stop after a fault."""
    calls = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda enabled="all": calls.append(enabled))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(Path(path).name))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    ranks = SimpleNamespace(rank=0, world=1, device=torch.device("cuda"))
    profiler = Profiler(ProfileConfig(3, [0], True), Events(tmp_path, 0), ranks, 5, lambda: None)
    with profiler.around(2):
        assert calls == []
    with profiler.around(3):
        torch.ones(3).sum()
    assert calls == ["all", "synchronize", "step_00000003.rank0.memory.pickle", None]
    calls.clear()
    with pytest.raises(ZeroDivisionError), profiler.around(3):
        raise ZeroDivisionError
    assert calls == ["all", None]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["profile.steps=[3,9]"], "profile.steps names step 9 and the run ends with step 8; name earlier ones"),
        (["profile.steps=7-99"], "profile.steps names step 9 and the run ends with step 8"),
        (["profile.steps=0"], "profile.steps=0 names no step; steps count from 1"),
        (["profile.steps=5-2"], "profile.steps=5-2 names no step"),
        (["profile.steps=1-9999999999"], "is 9999999999 steps; ask for at most 1000"),
        (["profile.steps=all"], "profile.steps=all is not a step; write 10, 10-12"),
        (["profile.steps=true"], "profile.steps=True is not a step"),
        (["profile.steps={a: 1}"], "is not a step"),
        (["profile.steps=1", "profile.ranks=[0,2]"], "profile.ranks names rank 2 and the last one of this run is 0"),
        (["profile.steps=1", "profile.ranks=[-1]"], "profile.ranks=[-1] names a rank below 0"),
    ],
)
def test_steps_and_ranks_that_do_not_exist(settings: dict, words: list[str], sentence: str) -> None:
    assert sentence in refuse(settings, *words)


def test_steps_of_a_run_in_tokens(settings: dict) -> None:
    """Six rows of 24 tokens are a step: 300 tokens are three."""
    del settings["run"]["steps"]
    settings["optim"]["schedule"] = {"warmup_steps": 2}
    assert "names step 4 and the run ends with step 3" in refuse(settings, "run.tokens=300", "profile.steps=4")


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        (None, []), (10, [10]), ("10", [10]), ("10-12", [10, 11, 12]), ([12, 10], [10, 12]), (["1-3", 2, "7-7"],
        [1, 2, 3, 7]), ([], []),
    ],
)  # fmt: skip
def test_ways_to_name_steps(value: object, steps: list[int]) -> None:
    assert profiled_steps(value) == steps


@pytest.mark.parametrize("value", [1.5, "1-", "-1", [None], "1-2-3", ""])
def test_invalid_steps(value: object) -> None:
    with pytest.raises(UserError, match="is not a step"):
        profiled_steps(value)
