"""A run that was killed or stopped and started again is the uninterrupted run, bit for bit.

Threads, launcher and shapes are the same on both sides, so there is no tolerance.
"""

import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.training.run_files import metrics, state, status, train
from trinity.monitor.monitor import SPIKES, Monitor
from trinity.run_directory import newest_config
from trinity.training import build
from trinity_kernels.linear import has_onednn

LAST = 8


def assert_same_run(run: Path, reference: Path) -> None:
    """Metrics and the last checkpoint agree in every bit."""
    assert metrics(run) == metrics(reference)
    tensors, expected = state(run, LAST), state(reference, LAST)
    assert tensors.keys() == expected.keys()
    assert any(name.startswith("model.") for name in expected)
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    """Wait until metrics.jsonl has this many lines."""
    path = run / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not path.exists() or len(path.read_text().splitlines()) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"no step {step} after a minute"
        time.sleep(0.005)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_sigkill(
    settings: dict, config_file: Callable, command: Callable, run_command: Callable, uninterrupted: Path, step: int
) -> None:
    """Killed before the first checkpoint, and between two."""
    run, words = Path(settings["run"]["dir"]), ("launch/pretrain.py", config_file(settings))
    process = command(*words)
    wait_for_step(process, run, step)
    process.kill()
    process.communicate()
    again = run_command(*words)
    assert again.code == 0, again.errors
    assert_same_run(run, uninterrupted)
    assert status(run) == {"state": "finished", "code": 0, "step": LAST, "reason": ""}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_signal(
    settings: dict, config_file: Callable, command: Callable, run_command: Callable, uninterrupted: Path,
    number: signal.Signals,
) -> None:  # fmt: skip
    """The step is finished and saved, the code is 75; the same command continues to the same end."""
    settings["checkpoint"] = {"every": 0}
    run, words = Path(settings["run"]["dir"]), ("launch/pretrain.py", config_file(settings))
    process = command(*words)
    wait_for_step(process, run, 2)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 75, errors
    stopped = status(run)
    assert errors.count("asked to stop: the step is finished and saved first") == 1
    assert f"\nsaved at step {stopped['step']} of {LAST} in 0:00:" in errors
    assert f", stopped by {number.name}; the same command resumes\n" in errors
    assert (stopped["state"], stopped["code"]) == ("saved", 75)
    assert number.name in stopped["reason"]
    assert 2 <= stopped["step"] < LAST
    assert len(metrics(run)) == stopped["step"]
    again = run_command(*words)
    assert again.code == 0, again.errors
    assert f"resuming after step {stopped['step']}" in again.errors
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_signal_while_waiting_for_other_ranks(
    settings: dict, config_file: Callable, command: Callable, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Rank 1 of two waits for a rank 0 that does not answer: it exits with 75 at once."""
    with socket.create_server(("127.0.0.1", 0)) as first:
        place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(first.getsockname()[1])}
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        process = command("launch/pretrain.py", config_file(settings))
        first.settimeout(60)
        connection, _ = first.accept()
        process.send_signal(number)
        errors = process.communicate(timeout=20)[1]
        connection.close()
    assert process.returncode == 75, errors


def test_a_finished_run_is_not_trained_again(settings: dict) -> None:
    """The same command after the end does nothing and ends with 0; more steps continue from there."""
    run = Path(settings["run"]["dir"])
    assert train(settings, "run.steps=4") == 0
    first = metrics(run)
    assert train(settings, "run.steps=4") == 0
    assert metrics(run) == first
    assert train(settings, "run.steps=6") == 0
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_the_choice_of_fp32_products_is_kept(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that started with one implementation goes on with it, though auto would now choose another."""
    chosen = "onednn" if has_onednn() else "torch"
    run, used = Path(settings["run"]["dir"]), []
    monkeypatch.setattr(build, "set_fp32_products", used.append)
    monkeypatch.setattr(build, "fastest_fp32_products", lambda: chosen)
    assert train(settings, "run.steps=1") == 0
    monkeypatch.setattr(build, "fastest_fp32_products", lambda: "torch")
    assert train(settings, "run.steps=2") == 0
    assert train(settings, "run.steps=3", "kernels.linear=torch") == 0
    assert train(settings, "run.steps=4") == 0
    assert used == [chosen, chosen, "torch", "torch"]
    assert newest_config(run).kernels.linear == "torch"


def test_the_cut_off_tail_of_metrics_is_kept(settings: dict) -> None:
    """Steps after the checkpoint are repeated; their first records stay in a tail file, an incomplete line included."""
    run = Path(settings["run"]["dir"])
    assert train(settings, "run.steps=3") == 0
    kept = (run / "metrics.jsonl").read_text()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    assert train(settings) == 0
    assert [line["step"] for line in metrics(run)] == list(range(1, LAST + 1))
    assert (run / "metrics.jsonl").read_text().startswith(kept)
    assert (run / "metrics.tail.1.jsonl").read_text() == '{"step": 4, "loss": 1.0}\n{"step": 5, "lo\n'


def test_evaluation_and_checkpoints_change_nothing(settings: dict, uninterrupted: Path) -> None:
    """A run that never evaluates and saves only at its end makes the same steps."""
    assert train(settings, "evaluation.every=0", "checkpoint.every=0") == 0
    run = Path(settings["run"]["dir"])
    without = [
        {key: value for key, value in line.items() if not key.startswith("validation_")}
        for line in metrics(uninterrupted)
    ]
    assert metrics(run) == without
    expected = state(uninterrupted, LAST)
    for name, tensor in state(run, LAST).items():
        assert torch.equal(tensor, expected[name]), name


def test_checkpoints_without_the_state_of_a_detector(
    settings: dict, monkeypatch: pytest.MonkeyPatch, uninterrupted: Path
) -> None:
    """Those of a version before a detector existed: it starts empty, and the training is the same."""
    with monkeypatch.context() as patched:
        patched.setattr(Monitor, "state", lambda monitor: {SPIKES: monitor.spikes.state()})
        assert train(settings, "run.steps=3", "evaluation.every=0") == 0
    run = Path(settings["run"]["dir"])
    assert not [key for key in state(run, 3) if key.startswith("run.collapse")]
    assert train(settings) == 0
    assert metrics(run) == metrics(uninterrupted)
