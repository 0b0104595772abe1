"""JSON files that every parser can read: null in place of NaN and infinity."""

import json
from pathlib import Path

import pytest

from trinity.io.json_files import number, read_json, to_json
from trinity.monitor.events import Events
from trinity.monitor.loggers import JsonLines
from trinity.run_directory import RunDirectory


def test_json_without_nan(tmp_path: Path) -> None:
    """null for every number that is not finite, at any depth; other values exactly; old files with NaN can be read."""
    value = {"a": float("nan"), "b": [1e-300, (float("inf"), -float("inf"))], "c": {"d": 0.1}, "e": None, "f": True}
    expected = {"a": None, "b": [1e-300, [None, None]], "c": {"d": 0.1}, "e": None, "f": True}
    assert json.loads(to_json(value), parse_constant=pytest.fail) == expected
    (tmp_path / "old.json").write_text('{"a": NaN, "b": Infinity}')
    old = read_json(tmp_path / "old.json")
    assert old["a"] != old["a"]
    assert old["b"] == float("inf")


def test_every_log_is_json(tmp_path: Path) -> None:
    """The records of a step whose loss is not finite, read by a parser that accepts no NaN."""
    log = JsonLines(tmp_path / "metrics.jsonl", 0)
    log.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr_muon": 0.1})
    log.close()
    Events(tmp_path, 0, 1).note("evaluation", "a sentence", loss=-float("inf"), layers=[float("nan"), 1.5])
    RunDirectory(tmp_path / "run").set_status("stopped", 3, 1, "NaN")
    read = [json.loads(path.read_text(), parse_constant=pytest.fail) for path in sorted(tmp_path.rglob("*.json*"))]
    (event, record, status) = read
    assert record == {"step": 1, "loss": None, "grad_norm": None, "lr_muon": 0.1}
    assert (event["loss"], event["layers"]) == (None, [None, 1.5])
    assert status["reason"] == "NaN"


def test_number_reads_null_as_nan() -> None:
    values = [1.5, float("nan"), -float("inf"), 2]
    back = [number(value) for value in json.loads(to_json(values))]
    assert [back[0], back[3]] == [1.5, 2]
    assert back[1] != back[1]
    assert back[2] != back[2]
