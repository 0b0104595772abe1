"""Whole runs: one model stays itself, planted coefficients are found, an interrupted run gives the same bytes."""

import json
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.dam.conftest import ALL, write_text
from tests.forked_program import ROOT, Program
from tests.merging.conftest import child, tensors_of
from trinity.checkpoint.directory import CheckpointDirectory
from trinity.dam import adaptive_merge, read_config
from trinity.dam.step import Learner
from trinity.dam.write import ColumnSum
from trinity.interop import export_hf
from trinity.merging.merge_models import Merger
from trinity.merging.plan import Job, make_plan
from trinity.merging.recipe import read_recipe


def result(settings: dict, folder: str) -> Path:
    """The folder that a run makes."""
    assert adaptive_merge(read_config(settings), folder) == 0
    return Path(folder)


def coefficients(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "coefficients.safetensors")


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("granularity", "compute"), [("column", "float32"), ("group", "float32"), ("column", "bfloat16")]
)
def test_one_model_stays_itself(family: Path, settings: Callable, granularity: str, compute: str) -> None:
    """Its logits are the teacher's bit for bit, so every gradient is 0 and all coefficients stay 1."""
    out = result(settings("a", learn=ALL, granularity=granularity, compute=compute), "out")
    assert all(bool((value == 1).all()) for value in coefficients(out).values())
    assert len(coefficients(out)) > 100
    expected, found = tensors_of(family / "a"), tensors_of(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"], line["grad_norm"]) for line in lines] == [(1, 0, 0), (2, 0, 0)]


def test_the_weights_are_those_of_the_coefficients(family: Path, settings: Callable) -> None:
    """Each tensor on disk is Σ c_i·W_i in fp32, rounded once; what is not learned is the mean."""
    out = result(settings("abc", learn=["attention", "experts"], out_dtype="bfloat16", rows=4), "out")
    learned, sources, found = coefficients(out), [tensors_of(family / name) for name in "abc"], tensors_of(out)
    assert any("experts.3.up" in name for name in learned)
    assert not any("router" in name or "lm_head" in name for name in learned)
    for name, tensor in found.items():
        c = learned.get(name, torch.full((3, 1), 1.0 / 3))
        expected = sources[0][name] * c[0] + sources[1][name] * c[1] + sources[2][name] * c[2]
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
        matrix = tensor.dim() == 2 and "router" not in name
        assert tensor.dtype == (torch.bfloat16 if matrix else torch.float32)
    summary = json.loads((out / "coefficients.json").read_text())
    attention = next(part for part in summary["parts"] if part["layer"] == 1 and part["part"] == "attention")
    values = torch.cat([value for name, value in learned.items() if "layers.1.self_attn" in name], dim=1)
    assert attention["mean"] == pytest.approx(values.double().mean(dim=1).tolist(), rel=1e-12)


PLANTED = {"head": (0.8, 0.3), "router": (0.35, 0.6)}


def test_planted_coefficients_are_found(family: Path, settings: Callable, texts: dict[str, str]) -> None:
    """A model made of a and b by known coefficients teaches alone; from 0.5 each they are found to 0.02.

    Head and router: no norm follows them, which would forget their scale.
    """
    for seed, name in enumerate("ab", 1):  # far apart, or only the sum of their coefficients would show in the logits
        export_hf(child(seed, size=3.0), family / name, family / "base", torch.float32, overwrite=True)
    recipe = {"merge_method": "linear", "models": [{"model": name, "parameters": {"weight": 0.5}} for name in "ab"]}
    words = {"lm_head": "head", "router.gate": "router"}

    def combine(job: Job) -> ColumnSum:
        planted = next((PLANTED[part] for word, part in words.items() if word in job.name), (0.5, 0.5))
        return ColumnSum(torch.tensor(planted).unsqueeze(1))

    plan = make_plan(read_recipe(recipe))
    jobs = [replace(job, merge=combine(job), arguments=combine(job).arguments) for job in plan.jobs]
    Merger(replace(plan, jobs=jobs), family / "target").run()
    write_text(family / "c.txt", 3, lines=500)
    content = settings(
        "ab", granularity="group", learn=["head", "router"], similarity=0.0, lr=1e-2, rows=320, window=16
    )
    models = [{"model": "a"}, {"model": "b"}, {"model": "target", "text": texts["c"], "weights": False}]
    out = result(content | {"models": models}, "out")
    for name, value in coefficients(out).items():
        planted = PLANTED["head" if "lm_head" in name else "router"]
        assert value.flatten().tolist() == pytest.approx(planted, abs=0.02), name


def test_an_interrupted_run_gives_the_same_bytes(family: Path, settings: Callable) -> None:
    """A failure after a checkpoint, and one while the result is written: the same command repeats the steps since."""
    content = settings("ab", save_every=2, rows=16)
    expected = all_bytes(result(content, "expected"))
    step, calls = Learner.step, []

    def failing(self: Learner, batch: dict) -> dict:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("killed")
        return step(self, batch)

    with mock.patch.object(Learner, "step", failing), pytest.raises(RuntimeError, match="killed"):
        adaptive_merge(read_config(content), "out")
    assert CheckpointDirectory.at(family / ".out.dam").complete_steps() == [2]
    assert not (family / "out").exists()
    with mock.patch("trinity.dam.run.write_merged", side_effect=RuntimeError("disk")), pytest.raises(RuntimeError):
        adaptive_merge(read_config(content), "out")
    found = all_bytes(result(content, "out"))
    assert found.keys() == expected.keys()
    assert found == expected
    assert not (family / ".out.dam").exists()


@pytest.mark.slow  # 2 × 40 steps, as the kill must come before the last
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed(family: Path, settings: Callable, number: signal.Signals) -> None:
    """The tool, killed after its first checkpoint, or asked to stop: the same command ends with the same bytes."""
    for name in "ab":
        write_text(family / f"{name}.txt", 1, lines=300)
    content = settings("ab", save_every=1, rows=160)
    (family / "DAM.yaml").write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    words = ["DAM.yaml", "out"]
    tool = Program(ROOT / "tools" / "dam.py", words, family)
    deadline = time.monotonic() + 100
    while not list((family / ".out.dam").glob("checkpoints/*/COMPLETE")) and time.monotonic() < deadline:
        assert tool.poll() is None
        time.sleep(0.01)
    tool.send_signal(number)
    _, errors = tool.communicate()
    assert tool.returncode == (75 if number == signal.SIGTERM else -9)
    assert ("the same command continues" in errors) == (number == signal.SIGTERM)
    steps = CheckpointDirectory.at(family / ".out.dam").complete_steps()
    assert 0 < steps[-1] < 40
    assert adaptive_merge(read_config(family / "DAM.yaml"), "out") == 0
    found = all_bytes(family / "out")
    expected = all_bytes(result(content, "expected"))
    tails = {name for name in found if ".tail." in name}
    assert {name: found[name] for name in found.keys() - tails} == expected
