"""Heartbeat, spikes, ways back, routers: each rule against its words, and each end as the config says."""

import itertools
import json
import math
import statistics
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.training.run_files import metrics, refuse, state, status, train
from trinity.data.stream.stream import SequenceStream
from trinity.models import ModelConfig, Trinity
from trinity.models.param_roles import parameter_roles
from trinity.monitor.heartbeat import Heartbeat
from trinity.monitor.loss_spikes import CAPACITY, SpikeDetector
from trinity.monitor.monitor import Monitor
from trinity.monitor.router_health import WINDOW, CollapseDetector
from trinity.training import train_step, trainer


def events(run: Path, kind: str | None = None) -> list[dict]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


def test_spikes_against_the_words_of_the_rule() -> None:
    """Mean and standard deviation of the last ordinary steps, by the library."""
    generator = torch.Generator().manual_seed(1)
    values = (torch.randn(400, generator=generator, dtype=torch.float64) + 5).tolist()
    for at in (20, 31, 150, 151, 399):
        values[at] += 6
    spikes, past, found = SpikeDetector(window=40, sigma=4), [], []
    for step, loss in enumerate(values):
        spiked = spikes.detect(loss, 1.0) is not None
        last = past[-40:]
        expected = len(last) >= 20 and loss > statistics.fmean(last) + 4 * statistics.pstdev(last)
        assert spiked == expected, step
        found += [step] if spiked else []
        past += [] if spiked else [loss]
    assert {20, 31, 150, 151, 399} <= set(found)


def test_a_gradient_norm_spikes_too_and_says_so() -> None:
    spikes = SpikeDetector(window=8, sigma=3)
    for step in range(8):
        assert spikes.detect(2.0, 1 + 0.01 * (step % 2)) is None
    assert spikes.detect(2.0, 1.5) == "gradient norm 1.5 stands 99.0 standard deviations above the mean 1.005"
    assert spikes.detect(2.1, 1.0) == "loss 2.1 stands any number of standard deviations above the mean 2"


def test_what_is_remembered_comes_back() -> None:
    one, other, shorter = SpikeDetector(20, 3), SpikeDetector(20, 3), SpikeDetector(5, 3)
    for step in range(33):
        one.detect(5 + math.sin(step), 1 + 0.1 * math.cos(step))
    assert one.state().shape == (2, CAPACITY)
    other.restore(one.state())
    assert torch.equal(other.state(), one.state())
    for step in range(33, 60):
        assert one.detect(5 + 3 * math.sin(step), 1) == other.detect(5 + 3 * math.sin(step), 1)
    shorter.restore(one.state())
    assert torch.equal(shorter.state()[:, -5:], one.state()[:, -5:])
    assert shorter.state().isinf().sum() == 2 * (CAPACITY - 5)


def test_a_climbing_layer_is_warned_of_once() -> None:
    collapse = CollapseDetector(factor=2, dead_steps=0)
    even = torch.tensor([[10, 10, 10, 10], [16, 8, 8, 8]])  # MaxVio 0 and 0.6
    skewed = torch.tensor([[10, 10, 10, 10], [29, 3, 4, 4]])  # and 1.9
    for _ in range(3 * WINDOW):
        assert collapse.update(even) == []
    found = [sentence for _ in range(3 * WINDOW) for sentence, _ in collapse.update(skewed)]
    assert found == ["MaxVio of MoE layer 1 has climbed to 1.25 from 0.60, over 20 steps"]
    for _ in range(3 * WINDOW):
        assert collapse.update(even) == []
    assert len([warning for _ in range(WINDOW) for warning in collapse.update(skewed)]) == 1


def test_a_watch_that_is_restored_says_the_same() -> None:
    """Saved and restored after every single step, through all of its warnings, against one that never was."""
    generator = torch.Generator().manual_seed(2)
    whole, warned = CollapseDetector(factor=1.5, dead_steps=4, first_layer=2), 0
    parts = CollapseDetector(factor=1.5, dead_steps=4, first_layer=2)
    for step in range(120):
        counts_ME = torch.randint(0, 40 + step * (step % 50 > 25), (3, 5), generator=generator)
        counts_ME[1] *= torch.tensor([step % 11 < 5, 1, 1, 1, 1])
        state = parts.state(3, 5)
        parts = CollapseDetector(factor=1.5, dead_steps=4, first_layer=2)
        parts.restore(state)
        said = whole.update(counts_ME)
        assert parts.update(counts_ME) == said
        warned += len(said)
    assert warned > 5
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in CollapseDetector(2, 1).state(3, 5).items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in parts.state(3, 5).items()
    }


def test_a_stop_does_not_silence_a_watch(settings: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An expert of the first layer gets no token: a run that was stopped after two steps says so after four.

    A checkpoint from before the watch was in it can be loaded, and the watch begins anew.
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
    found = [(event["step"], event["message"]) for event in events(Path(settings["run"]["dir"]), "collapse")]
    assert found == [(4, "MoE layer 1 has 1 experts without a token for 4 steps: [0]")]
    settings["run"]["dir"] = str(tmp_path / "old")
    with monkeypatch.context() as before:
        before.setattr(Monitor, "state", spikes_alone)
        assert train(settings, *words, "run.steps=1") == 0
    assert train(settings, *words, "run.steps=4") == 0
    assert events(tmp_path / "old", "collapse") == []


def test_dead_experts_are_named() -> None:
    collapse = CollapseDetector(factor=0, dead_steps=3)
    alive, dead = torch.tensor([[1, 1, 1], [1, 1, 1]]), torch.tensor([[1, 1, 1], [3, 0, 0]])
    looks = [alive, dead, dead, alive, dead, dead, dead, dead]
    found = [collapse.update(counts) for counts in looks]
    assert [bool(warnings) for warnings in found] == [False] * 6 + [True, False]
    assert found[6][0][0] == "MoE layer 1 has 2 experts without a token for 3 steps: [1, 2]"


def test_layers_have_their_number_in_the_model() -> None:
    """Two dense layers come first: the second router is that of layer 3."""
    found = CollapseDetector(0, dead_steps=1, first_layer=2).update(torch.tensor([[1, 1], [2, 0]]))
    assert found == [("MoE layer 3 has 1 experts without a token for 1 steps: [1]", {"layer": 3, "dead": 1})]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], list[int]]:
    """poisoned({k, …}): these steps, counted from 0 as they are made, get a gradient norm a thousand times as large."""

    def poison(calls: set[int]) -> list[int]:
        made: list[int] = []
        norm = train_step.global_norm

        def enlarged(*args: object) -> torch.Tensor:
            made.append(len(made))
            return norm(*args) * (1000 if made[-1] in calls else 1)

        monkeypatch.setattr(train_step, "global_norm", enlarged)
        return made

    return poison


WORDS = ["health.spike.window=6", "health.spike.sigma=20", "evaluation.every=0"]


def test_a_warning_changes_nothing(settings: dict, poisoned: Callable) -> None:
    """Every figure and bit as with no rule; the event says what stood out."""
    run = Path(settings["run"]["dir"])
    poisoned({6})
    assert train(settings, *WORDS, "run.dir=" + str(run / "plain"), "health.spike.action=none") == 0
    poisoned({6})
    assert train(settings, *WORDS, "run.dir=" + str(run / "warned")) == 0
    plain, warned = metrics(run / "plain"), metrics(run / "warned")
    assert [line.pop("spike") for line in warned] == [step == 7 for step in range(1, 9)]
    assert [line.pop("spike") for line in plain] == [False] * 8
    assert warned == plain
    (event,) = events(run / "warned", "spike")
    assert (event["step"], event["action"]) == (7, "warn")
    assert "gradient norm" in event["message"]


def test_a_skipped_spike_changes_nothing_but_the_count(settings: dict, poisoned: Callable) -> None:
    """Weights, momentum and biases after it are those before it; and the steps after it do not count as bad."""
    run = Path(settings["run"]["dir"])
    poisoned({6})
    words = [*WORDS, "health.spike.action=skip", "health.bad_steps=1", "checkpoint.every=1", "checkpoint.keep=9"]
    assert train(settings, *words) == 0
    before, after = state(run, 6), state(run, 7)
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith(("model.", "optim.")))
    lines = metrics(run)
    assert [line["skipped"] for line in lines] == [step == 7 for step in range(1, 9)]
    assert lines[7]["sequences"] == 72


def test_the_way_back_after_a_spike(settings: dict, poisoned: Callable) -> None:
    """The spike in step 7 leads back to the checkpoint of step 6 and on with what comes after the data of step 7.

    What follows is, bit for bit, a run that was started from that checkpoint with the stream moved on by hand.
    """
    run = Path(settings["run"]["dir"])
    poisoned({6})
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

    poisoned(set())
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


def test_a_run_that_cannot_go_back_ends(settings: dict, poisoned: Callable) -> None:
    """No checkpoint before the spike: code 3, and STOP."""
    poisoned({6})
    words = [*WORDS, "health.spike.action=rollback", "checkpoint.every=0"]
    assert train(settings, *words) == trainer.TOO_MANY_BAD_STEPS
    run = Path(settings["run"]["dir"])
    assert status(run)["code"] == 3
    assert "spikes come again" in (run / "STOP").read_text()


def test_router_figures(settings: dict) -> None:
    """Loads sum to one in each layer, and biases move by what the next line shows."""
    assert train(settings, "log.router_every=2", "checkpoint.every=1", "checkpoint.keep=9") == 0
    run = Path(settings["run"]["dir"])
    lines = [json.loads(line) for line in (run / "router.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 6, 8]
    by_step = {line["step"]: line for line in metrics(run)}
    for line in lines:
        assert [round(sum(load), 12) for load in line["load"]] == [1.0] * 4
        assert line["tokens"] == by_step[line["step"]]["tokens"]
        assert max(line["max_violation"]) == pytest.approx(by_step[line["step"]]["max_violation"], rel=1e-12)
        assert max(line["bias_range"]) == pytest.approx(by_step[line["step"]]["bias_range"], rel=1e-6)
        saved = state(run, line["step"])
        biases = [saved[f"model.blocks.{layer}.ffn.expert_bias"] for layer in range(1, 5)]
        assert torch.equal(torch.tensor(line["bias"]), torch.stack(biases))
        if line["step"] > 1:
            earlier = state(run, line["step"] - 1)
            for layer, norm in enumerate(line["bias_step_norm"], 1):
                step = biases[layer - 1] - earlier[f"model.blocks.{layer}.ffn.expert_bias"]
                assert norm == pytest.approx(step.norm().item(), rel=1e-6)


def test_norms_of_weights_and_updates(settings: dict) -> None:
    """Against the checkpoints before and after the step; sums of 50,000 squares in fp32 and float64 differ by 1e-6."""
    assert train(settings, "log.norms_every=4", "checkpoint.every=1", "checkpoint.keep=9") == 0
    run = Path(settings["run"]["dir"])
    lines = {line["step"]: line for line in metrics(run)}
    assert [step for step, line in lines.items() if "weight_norm.matrix" in line] == [4, 8]
    roles = parameter_roles(Trinity(ModelConfig(**settings["model"])))
    for step in (4, 8):
        before, after = state(run, step - 1), state(run, step)
        for kind in {role.kind for role in roles}:
            names = [f"model.{role.name}" for role in roles if role.kind == kind]
            weights = torch.cat([after[name].flatten() for name in names]).double()
            update = weights - torch.cat([before[name].flatten() for name in names]).double()
            assert lines[step][f"weight_norm.{kind}"] == pytest.approx(weights.norm().item(), rel=1e-6)
            assert lines[step][f"update_norm.{kind}"] == pytest.approx(update.norm().item(), rel=1e-5)


@pytest.mark.slow
def test_a_step_that_hangs_ends_the_run(
    settings: dict, config_file: Callable, run_command: Callable, tmp_path: Path
) -> None:
    """Code 1, the stacks of all threads with the place that hangs, and an event."""
    (tmp_path / "sitecustomize.py").write_text(
        "import time, sys\n"
        "def hang(frame, event, argument):\n"
        "    if frame.f_code.co_name == 'train_step':\n"
        "        hang.calls += 1\n"
        "        if hang.calls == 3:\n"
        "            def waits_for_ever():\n"
        "                time.sleep(1000)\n"
        "            sys.setprofile(None)\n"
        "            waits_for_ever()\n"
        "hang.calls = 0\n"
        "if sys.argv and 'pretrain' in ' '.join(sys.orig_argv):\n"
        "    sys.setprofile(lambda f, e, a: hang(f, e, a) if e == 'call' else None)\n"
    )
    settings["health"] = {"heartbeat_seconds": 2}
    with mock.patch.dict("os.environ", {"PYTHONPATH": str(tmp_path)}):
        done = run_command("launch/pretrain.py", config_file(settings))
    assert done.code == 1, done.errors
    run = Path(settings["run"]["dir"])
    assert "waits_for_ever" in (run / "stacks.rank0.txt").read_text()
    (event,) = events(run, "heartbeat")
    assert (event["step"], event["message"].split(";")[0]) == (3, "no progress for 2 s while training")
    assert "heartbeat: no progress" in done.errors


@pytest.mark.parametrize("beating", [True, False])
def test_the_alarm_hears_beats_and_no_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beating: bool) -> None:
    """A clock that is set back and forward raises no alarm while something beats; without a beat there is one."""
    clock = itertools.cycle([1e9, 0.0, 2e9])
    alarms: list[float] = []
    monkeypatch.setattr(time, "time", lambda: next(clock))
    monkeypatch.setattr(Heartbeat, "_alarm", lambda self, limit: alarms.append(limit))
    heartbeat = Heartbeat(1, mock.Mock(), tmp_path)
    heartbeat.step_done()
    for _ in range(20):
        time.sleep(0.1)
        if beating:
            heartbeat.beat()
    heartbeat.close()
    assert bool(alarms) != beating


def test_what_takes_long_has_as_long_as_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alarms: list[float] = []
    monkeypatch.setattr(Heartbeat, "_alarm", lambda self, limit: alarms.append(limit))
    heartbeat = Heartbeat(0.2, mock.Mock(), tmp_path)
    heartbeat.step_done()
    heartbeat.begin_long("exporting")
    time.sleep(0.8)
    assert not alarms
    time.sleep(1.8)
    heartbeat.close()
    assert set(alarms) == {2.0}


def test_a_run_without_routers_is_watched_too(settings: dict) -> None:
    """All layers dense: no line of router.jsonl, and nothing to fail on."""
    settings["model"]["dense_layers"] = settings["model"]["layers"]
    assert train(settings, "run.steps=2", "log.norms_every=1") == 0
    assert (Path(settings["run"]["dir"]) / "router.jsonl").read_text() == ""


def test_a_refused_start_leaves_no_watch(settings: dict) -> None:
    """A mistake found while loading ends the watch with it: no thread is left that would end this process later."""
    assert train(settings, "run.steps=3") == 0
    settings["data"]["train"]["code"] = settings["data"]["train"]["prose"]
    refuse(settings)
    time.sleep(1.2)
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}
