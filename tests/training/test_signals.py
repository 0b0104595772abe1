"""SIGTERM at a chosen moment: the step is finished and saved, and the same command continues with the same bits."""

import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint import filesystem

from tests.training.fault_injection import replace_nth_call
from tests.training.run_files import metrics, state, status, train
from trinity.checkpoint import checkpoint
from trinity.data.stream.loader import _Worker
from trinity.interop import export
from trinity.models import Trinity
from trinity.training import trainer

LAST = 8


def asked_before(where: Any, name: str, times: int) -> mock._patch:
    """Wrap a function: its n-th call starts with a SIGTERM."""
    function = getattr(where, name)

    def ask_and_go_on(*args: Any, **words: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **words)

    return mock.patch.object(where, name, replace_nth_call(times, function, instead=ask_and_go_on))


# moment: what brings it about, and the step that is saved. One microbatch a step, two from step 5 on; the probe of step
# 1 is a forward pass too, and so is the evaluation after step 4; a checkpoint of some 150 tensors after steps 3 and 6.
MOMENTS = {
    "waiting for data": (lambda: asked_before(_Worker, "receive", 4), 1),
    "forward": (lambda: asked_before(Trinity, "forward", 8), 5),
    "backward": (lambda: asked_before(torch.Tensor, "backward", 6), 5),
    "writing a checkpoint": (lambda: asked_before(filesystem, "_write_item", 30), 4),
    "publishing a checkpoint": (lambda: asked_before(checkpoint, "write_atomically", 1), 4),
    "evaluating": (lambda: asked_before(Trinity, "forward", 6), 4),
    "exporting": (lambda: asked_before(export, "save_file", 1), 6),
}
SLOW = {"backward", "publishing a checkpoint", "exporting"}


@pytest.mark.parametrize(
    "moment", [pytest.param(moment, marks=pytest.mark.slow if moment in SLOW else ()) for moment in MOMENTS]
)
def test_stop_signal(settings: dict, uninterrupted: Path, moment: str) -> None:
    """Code 75; then, without the signal, every metric of every step and every tensor equals the undisturbed run's."""
    run, (interruption, saved) = Path(settings["run"]["dir"]), MOMENTS[moment]
    words = ["export.every=5"] if moment == "exporting" else []
    with interruption():
        assert train(settings, "checkpoint.asynchronous=false", *words) == trainer.SAVED
    assert status(run) == {"state": "saved", "code": 75, "step": saved, "reason": "asked to stop by SIGTERM"}
    assert [line["step"] for line in metrics(run)] == list(range(1, saved + 1))
    assert train(settings) == 0
    assert metrics(run) == metrics(uninterrupted)
    resumed, expected = state(run, LAST), state(uninterrupted, LAST)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
