"""Worker processes and the garbage of the process that starts them."""

import gc
import os
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from trinity.data.worker_process import CONTEXT, FORKS, exit_reason, start_worker


class KillsOtherProcesses:
    """A cyclic object whose finalizer is safe only in the process that made it."""

    def __init__(self) -> None:
        self.process, self.cycle = os.getpid(), self

    def __del__(self) -> None:
        if os.getpid() != self.process:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def garbage() -> Iterator[None]:
    """Uncollected garbage in this process."""
    gc.collect()
    gc.disable()
    try:
        KillsOtherProcesses()
        gc.enable()
        yield
    finally:
        gc.enable()
        gc.collect()


def collect_and_answer(pipe: Connection) -> None:
    """Collect garbage as any allocation may, then say whether the collector is on."""
    gc.collect()
    pipe.send(gc.isenabled())


@pytest.mark.skipif(not FORKS, reason="a spawned process inherits no garbage")
def test_a_worker_never_collects_its_parents_garbage(garbage: None) -> None:
    """Neither in what multiprocessing does first nor later; its own garbage is collected."""
    here, there = CONTEXT.Pipe(duplex=False)
    process = start_worker(collect_and_answer, (there,), blocked=[signal.SIGINT])
    there.close()
    assert here.recv() is True
    assert exit_reason(process) == "ended with code 0"
    assert gc.isenabled()
