"""Runs of several processes that start in half a second: each rank is a fork of a server that has everything imported.

As under torchrun, the ranks find each other in a store that outlives them, which this process holds, and each leaves
with the exit code that a launcher sees.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed as dist

from trinity.config.load import OmegaConf, build_config
from trinity.errors import run_main
from trinity.training.trainer import pretrain

SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(["trinity.training.trainer", "torch.distributed.checkpoint", "torch.distributed.fsdp"])

SECONDS = 60
"""How long a run may take to end once something has happened to it. A rank hears at once that a neighbour's connection
is closed; starting, stepping and saving take seconds on a busy machine."""

Trouble = Callable[[], AbstractContextManager]
"""Makes what a rank runs under; a function at the top of a module, perhaps with arguments (functools.partial)."""


class Ranks:
    """The processes of one start of a run.

    Attributes:
        processes: by rank.
        log: stdout and stderr of all of them.
    """

    def __init__(self, settings: dict, words: tuple[str, ...], troubles: list[Trouble], log: Path) -> None:
        """Start one rank for each trouble."""
        self.log, world = log, len(troubles)
        self._said_before = log.stat().st_size if log.exists() else 0
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
        place |= {"MASTER_PORT": self._store.port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        self._alive, alive = SERVER.Pipe(duplex=False)
        self.processes: list[BaseProcess] = []
        for rank, trouble in enumerate(troubles):
            own = {name: str(value) for name, value in (place | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            self.processes.append(SERVER.Process(target=_rank, args=(settings, words, trouble, own, log, alive)))
            self.processes[-1].start()
        alive.close()

    def log_text(self) -> str:
        """The log since this start."""
        return self.log.read_bytes()[self._said_before :].decode() if self.log.exists() else ""

    def wait(self) -> list[int]:
        """The exit codes, by rank, once every process is gone, those that prepare data among them."""
        assert self._alive.poll(SECONDS), f"still there after {SECONDS} s: {self.log_text()[-3000:]}"
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """SIGKILL to every rank."""
        for process in self.processes:
            process.kill()


@contextmanager
def ranks(
    settings: dict, words: tuple[str, ...] = (), world: int = 1, trouble: Trouble = nullcontext, rank: int = 0
) -> Iterator[Ranks]:
    """Start a run with a fault on one rank; no process is left afterwards."""
    troubles = [trouble if place == rank else nullcontext for place in range(world)]
    started = Ranks(settings, words, troubles, Path(settings["run"]["dir"]).with_suffix(".log"))
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def run(settings: dict, *words: str, world: int = 1, trouble: Trouble = nullcontext, rank: int = 0) -> list[int]:
    """Run to the end; return the exit code of each rank."""
    with ranks(settings, words, world, trouble, rank) as started:
        return started.wait()


def wait_for(condition: Callable[[], bool], started: Ranks) -> None:
    """Wait until a condition holds, while all ranks live."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert all(process.is_alive() for process in started.processes), started.log_text()[-3000:]
        assert time.monotonic() < deadline, started.log_text()[-3000:]
        time.sleep(0.002)


def _rank(
    settings: dict, words: tuple[str, ...], trouble: Trouble, place: dict[str, str], log: Path, _alive: Connection
) -> None:
    """What launch/pretrain.py does; the connection is inherited by data workers and closes with the last of them."""
    os.environ.update(place)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    raw = [("test", OmegaConf.create(settings)), ("test", OmegaConf.from_dotlist(list(words)))]
    with trouble():
        run_main(partial(pretrain, build_config(raw), []))
