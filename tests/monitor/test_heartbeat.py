"""The heartbeat's alarm: when it is raised, and what a hanging run leaves behind."""

import itertools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from tests.monitor.run_events import events
from tests.training.run_files import refuse, train
from trinity.monitor.heartbeat import Heartbeat


@pytest.mark.slow
def test_a_step_that_hangs_ends_the_run(
    settings: dict, config_file: Callable, fresh_command: Callable, tmp_path: Path
) -> None:
    """Code 1, the stacks of all threads with the function that hangs, and an event."""
    (tmp_path / "sitecustomize.py").write_text(
        "import time, sys\n"
        "def hang(frame, event, argument):\n"
        "    if frame.f_code.co_name == 'train_step':\n"
        "        hang.calls += 1\n"
        "        if hang.calls == 3:\n"
        "            def hang_forever():\n"
        "                time.sleep(1000)\n"
        "            sys.setprofile(None)\n"
        "            hang_forever()\n"
        "hang.calls = 0\n"
        "if sys.argv and 'pretrain' in ' '.join(sys.orig_argv):\n"
        "    sys.setprofile(lambda f, e, a: hang(f, e, a) if e == 'call' else None)\n"
    )
    settings["health"] = {"heartbeat_seconds": 2}
    process = fresh_command("launch/pretrain.py", config_file(settings), env=os.environ | {"PYTHONPATH": str(tmp_path)})
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    run = Path(settings["run"]["dir"])
    assert "hang_forever" in (run / "stacks.rank0.txt").read_text()
    (event,) = events(run, "heartbeat")
    assert (event["step"], event["message"].split(";")[0]) == (3, "no progress for 2 s while training")
    assert "heartbeat: no progress" in errors


@pytest.mark.parametrize("beating", [True, False])
def test_beats_prevent_the_alarm_when_the_clock_jumps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beating: bool
) -> None:
    """A system clock that is set back and forward raises no alarm while something beats; without beats there is one."""
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


def test_a_long_activity_has_the_timeout_of_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_refused_start_leaves_no_heartbeat(settings: dict) -> None:
    """A mistake found while loading stops the heartbeat: no thread is left that would end this process later."""
    assert train(settings, "run.steps=3") == 0
    settings["data"]["train"]["code"] = settings["data"]["train"]["prose"]
    refuse(settings)
    time.sleep(1.2)
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}
