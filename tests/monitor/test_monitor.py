"""The monitor in whole runs: warnings, skipped steps, rollbacks, router.jsonl, and state in checkpoints."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.monitor.run_events import events
from tests.training.run_files import metrics, state, status, train
from trinity.data.stream.stream import SequenceStream
from trinity.monitor.monitor import Monitor
from trinity.monitor.router_health import CollapseDetector
from trinity.training import train_step, trainer


def test_a_restart_keeps_the_dead_experts_count(
    settings: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An expert of the first layer gets no token: a run that was stopped after two steps warns after four.

    A checkpoint without the detector's state can be loaded, and the detector starts empty.
    """
    update = CollapseDetector.update

    def without_the_first(collapse: CollapseDetector, counts_ME: torch.Tensor) -> list:
        return update(collapse, counts_ME.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(0)))

    def spikes_alone(monitor: Monitor) -> dict[str, torch.Tensor]:
        return {"spikes": monitor.spikes.state()}

    monkeypatch.setattr(CollapseDetector, "update", without_the_first)
    settings["data"]["workers"] = 0
    words = ["health.dead_steps=4", "evaluation.every=0", "checkpoint.every=0"]
    assert train(settings, *words, "run.steps=2") == 0
    assert train(settings, *words, "run.steps=4") == 0
    warnings = [(event["step"], event["message"]) for event in events(Path(settings["run"]["dir"]), "collapse")]
    assert warnings == [(4, "MoE layer 1 has 1 experts without a token for 4 steps: [0]")]
    settings["run"]["dir"] = str(tmp_path / "old")
    with monkeypatch.context() as before:
        before.setattr(Monitor, "state", spikes_alone)
        assert train(settings, *words, "run.steps=1") == 0
    assert train(settings, *words, "run.steps=4") == 0
    assert events(tmp_path / "old", "collapse") == []


@pytest.fixture
def scale_gradient_norms(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], list[int]]:
    """scale_gradient_norms({k, …}): multiply the gradient norm of these steps, counted from 0 as they run, by 1000."""

    def scale(calls: set[int]) -> list[int]:
        steps: list[int] = []
        norm = train_step.global_norm

        def enlarged(*args: object) -> torch.Tensor:
            steps.append(len(steps))
            return norm(*args) * (1000 if steps[-1] in calls else 1)

        monkeypatch.setattr(train_step, "global_norm", enlarged)
        return steps

    return scale


WORDS = ["health.spike.window=6", "health.spike.sigma=20", "evaluation.every=0"]


def test_a_spike_warning_changes_nothing(settings: dict, scale_gradient_norms: Callable) -> None:
    """Every metric and bit is that of a run without spike detection; the event describes the spike."""
    run = Path(settings["run"]["dir"])
    scale_gradient_norms({6})
    assert train(settings, *WORDS, "run.dir=" + str(run / "plain"), "health.spike.action=none") == 0
    scale_gradient_norms({6})
    assert train(settings, *WORDS, "run.dir=" + str(run / "warned")) == 0
    plain, warned = metrics(run / "plain"), metrics(run / "warned")
    assert [line.pop("spike") for line in warned] == [step == 7 for step in range(1, 9)]
    assert [line.pop("spike") for line in plain] == [False] * 8
    assert warned == plain
    (event,) = events(run / "warned", "spike")
    assert (event["step"], event["action"]) == (7, "warn")
    assert "gradient norm" in event["message"]


def test_a_skipped_spike_changes_nothing_but_the_count(settings: dict, scale_gradient_norms: Callable) -> None:
    """Weights, momentum and biases stay as before it; and a skipped spike does not count as a bad step."""
    run = Path(settings["run"]["dir"])
    scale_gradient_norms({6})
    words = [*WORDS, "health.spike.action=skip", "health.bad_steps=1", "checkpoint.every=1", "checkpoint.keep=9"]
    assert train(settings, *words) == 0
    before, after = state(run, 6), state(run, 7)
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith(("model.", "optim.")))
    lines = metrics(run)
    assert [line["skipped"] for line in lines] == [step == 7 for step in range(1, 9)]
    assert lines[7]["sequences"] == 72


def test_rollback_after_a_spike(settings: dict, scale_gradient_norms: Callable) -> None:
    """A spike in step 7 rolls back to the checkpoint of step 6 and continues with the data after that of step 7.

    The steps after it equal, bit for bit, a run that was started from that checkpoint with the stream advanced by hand.
    """
    run = Path(settings["run"]["dir"])
    scale_gradient_norms({6})
    words = [*WORDS, "health.spike.action=rollback", "checkpoint.keep=9"]
    assert train(settings, *words, "run.steps=10") == 0
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["attempt"] for line in lines] == [0] * 6 + [1] * 4
    assert [b["tokens"] - a["tokens"] for a, b in pairwise(lines)][5:] == [288] * 4
    (event,) = events(run, "rollback")
    assert event["message"] == "from step 7 to the checkpoint of step 6, past its data"
    assert state(run, 10)["data.jumped"].tolist() == [[0, 0], [48, 60]]
    assert state(run, 10)["data.k"] == 96 + 12

    scale_gradient_norms(set())
    other = run.with_name("by_hand")
    assert train(settings, *words, "run.steps=6", f"run.dir={other}") == 0
    load = SequenceStream.load_state_dict

    def load_and_jump(self: SequenceStream, saved: dict) -> None:
        load(self, saved)
        self.advance(12)
        self.jump(48)

    with mock.patch.object(SequenceStream, "load_state_dict", load_and_jump):
        assert train(settings, *words, "run.steps=10", f"run.dir={other}") == 0
    assert metrics(other) == [line | {"attempt": 0} for line in lines]
    one, by_hand = state(run, 10), state(other, 10)
    assert one.keys() == by_hand.keys()
    assert {key for key in one if not torch.equal(one[key], by_hand[key])} == {"run.rollbacks"}


def test_a_run_without_a_checkpoint_to_roll_back_to_ends(settings: dict, scale_gradient_norms: Callable) -> None:
    """No checkpoint before the spike: code 3, and STOP."""
    scale_gradient_norms({6})
    words = [*WORDS, "health.spike.action=rollback", "checkpoint.every=0"]
    assert train(settings, *words) == trainer.TOO_MANY_BAD_STEPS
    run = Path(settings["run"]["dir"])
    assert status(run)["code"] == 3
    assert "a loss spike cannot be rolled back" in (run / "STOP").read_text()


def test_router_records(settings: dict) -> None:
    """Loads sum to one in each layer, and biases are those of the checkpoints."""
    assert train(settings, "log.router_every=2", "checkpoint.every=1", "checkpoint.keep=9") == 0
    run = Path(settings["run"]["dir"])
    lines = [json.loads(line) for line in (run / "router.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 6, 8]
    by_step = {line["step"]: line for line in metrics(run)}
    for line in lines:
        assert [round(sum(load), 12) for load in line["load"]] == [1.0] * 2
        assert line["tokens"] == by_step[line["step"]]["tokens"]
        assert max(line["max_violation"]) == pytest.approx(by_step[line["step"]]["max_violation"], rel=1e-12)
        assert max(line["bias_range"]) == pytest.approx(by_step[line["step"]]["bias_range"], rel=1e-6)
        saved = state(run, line["step"])
        biases = [saved[f"model.blocks.{layer}.ffn.expert_bias"] for layer in range(1, 3)]
        assert torch.equal(torch.tensor(line["bias"]), torch.stack(biases))
        if line["step"] > 1:
            earlier = state(run, line["step"] - 1)
            for layer, norm in enumerate(line["bias_step_norm"], 1):
                step = biases[layer - 1] - earlier[f"model.blocks.{layer}.ffn.expert_bias"]
                assert norm == pytest.approx(step.norm().item(), rel=1e-6)


def test_a_run_without_routers(settings: dict) -> None:
    """All layers dense: router.jsonl stays empty, and the run does not fail."""
    settings["model"]["dense_layers"] = settings["model"]["layers"]
    assert train(settings, "run.steps=2", "log.norms_every=1") == 0
    assert (Path(settings["run"]["dir"]) / "router.jsonl").read_text() == ""
