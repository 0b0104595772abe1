"""Process groups that are started once and then run many cases: a gloo group of N processes behind one method.

A case is a function of a test file, run on every rank; what it returns on each comes back as a list. It finds the
default process group made. If it fails or hangs on one rank, the group is thrown away and the test fails with that
rank's traceback.
"""

import importlib
import io
import logging
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import device_mesh

SECONDS = 120
"""How long one case may take; a collective that waits longer is a rank that is missing."""


class ProcessPool:
    """N processes in one gloo group, one thread each."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, case: Callable[..., Any], *args: Any) -> list[Any]:
        """case(*args) on every rank; the results in order of rank.

        Args:
            case: a function at the top of a module; args and result: anything that torch.save takes.
        """
        if not self._workers:
            self._start()
        task = _packed((case.__module__, case.__qualname__, args))
        for _, pipe in self._workers:
            pipe.send_bytes(task)
        results = {}
        while len(results) < self.world:
            waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._workers) if rank not in results}
            ready = wait(list(waiting), timeout=SECONDS)
            if not ready:
                self._fail(f"ranks {sorted(waiting.values())} of {self.world} did not answer in {SECONDS} s")
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    good, value = _unpacked(pipe.recv_bytes())
                except EOFError:
                    self._fail(f"rank {rank} of {self.world} died")
                if not good:
                    self._fail(f"rank {rank} of {self.world}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(self.world)]

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        context = get_context("spawn")
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.world):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.world, str(store), there), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))

    def _fail(self, reason: str) -> None:
        self.close()
        raise AssertionError(reason)


def _work(rank: int, world: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # that gathering is slow
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS)
    )
    # A mesh has process groups, each with threads that live as long as the process: equal meshes are made once.
    device_mesh.init_device_mesh = dist.init_device_mesh = cache(device_mesh.init_device_mesh)
    while True:
        try:
            module, name, args = _unpacked(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):  # the tests are over
            return
        try:
            answer = True, getattr(importlib.import_module(module), name)(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send_bytes(_packed(answer))


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
