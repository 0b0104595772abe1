"""Runs of several processes that start in half a second: each rank is forked from a server with all imports done.

As under torchrun, the ranks rendezvous in a store that outlives them, here in this process, and each exits with the
code that a launcher would see.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed as dist

from tests.forked_program import SERVER
from trinity.config.load import OmegaConf, build_config
from trinity.errors import run_main
from trinity.training.trainer import pretrain

SECONDS = 60
"""Longest time that a run may take to end after a fault. A rank notices at once that a peer's connection is closed;
starting, training and saving take seconds on a busy machine."""

Fault = Callable[[], AbstractContextManager]
"""Returns the context manager in which a rank runs: a module-level function, or functools.partial of one."""


class Ranks:
    """The processes of one start of a run.

    Attributes:
        processes: by rank.
        log: stdout and stderr of all of them.
    """

    def __init__(self, settings: dict, words: tuple[str, ...], faults: list[Fault], log: Path) -> None:
        """Start one rank for each fault."""
        self.log, world = log, len(faults)
        self._said_before = log.stat().st_size if log.exists() else 0
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
        place |= {"MASTER_PORT": self._store.port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        self._alive, alive = SERVER.Pipe(duplex=False)
        self.processes: list[BaseProcess] = []
        for rank, fault in enumerate(faults):
            own = {name: str(value) for name, value in (place | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            self.processes.append(SERVER.Process(target=_rank, args=(settings, words, fault, own, log, alive)))
            self.processes[-1].start()
        alive.close()

    def log_text(self) -> str:
        """The log since this start."""
        return self.log.read_bytes()[self._said_before :].decode() if self.log.exists() else ""

    def wait(self) -> list[int]:
        """Wait until every process has ended, data workers included; return the exit codes by rank."""
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
    settings: dict, words: tuple[str, ...] = (), world: int = 1, fault: Fault = nullcontext, rank: int = 0
) -> Iterator[Ranks]:
    """Start a run with a fault on one rank; no process is left afterwards."""
    faults = [fault if place == rank else nullcontext for place in range(world)]
    started = Ranks(settings, words, faults, Path(settings["run"]["dir"]).with_suffix(".log"))
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def run(settings: dict, *words: str, world: int = 1, fault: Fault = nullcontext, rank: int = 0) -> list[int]:
    """Run to the end; return the exit code of each rank."""
    with ranks(settings, words, world, fault, rank) as started:
        return started.wait()


def wait_for(condition: Callable[[], bool], started: Ranks) -> None:
    """Wait until a condition holds, while all ranks live."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert all(process.is_alive() for process in started.processes), started.log_text()[-3000:]
        assert time.monotonic() < deadline, started.log_text()[-3000:]
        time.sleep(0.002)


def _rank(
    settings: dict, words: tuple[str, ...], fault: Fault, place: dict[str, str], log: Path, _alive: Connection
) -> None:
    """What launch/pretrain.py does; the connection is inherited by data workers and closes with the last of them."""
    os.environ.update(place)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    raw = [("test", OmegaConf.create(settings)), ("test", OmegaConf.from_dotlist(list(words)))]
    with fault():
        run_main(partial(pretrain, build_config(raw), []))
