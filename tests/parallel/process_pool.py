"""A pool of N processes in one gloo group, started once for many tests.

A case is a module-level function of a test file. The pool runs it on every rank, with the default process group
initialized, and returns the results as a list. If it fails or hangs on one rank, the pool ends its processes and the
test fails with that rank's traceback.
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
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import device_mesh

from tests.forked_program import SERVER

TIMEOUT = 120
"""Seconds for one case, and for one collective."""

MOST_GROUPS = 24
"""Process groups that are kept for the next case; with more, the next case gets new processes. Each group has threads
that wake a hundred times a second: the hundreds of groups of a whole suite would take more time than its cases.
Destroying groups alone is not enough, as torch keeps placements of tensors that name them."""


class ProcessPool:
    """N processes in one gloo group, one thread each."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, case: Callable[..., Any], *args: Any) -> list[Any]:
        """Call case(*args) on every rank; return the results in order of rank.

        Args:
            case: a module-level function; its arguments and result can be saved by torch.save.
        """
        if not self._workers:
            self._start()
        task = _serialize((case.__module__, case.__qualname__, args))
        for _, pipe in self._workers:
            pipe.send_bytes(task)
        results, groups = {}, 0
        while len(results) < self.world:
            waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._workers) if rank not in results}
            ready = wait(list(waiting), timeout=TIMEOUT)
            if not ready:
                self._fail(f"ranks {sorted(waiting.values())} of {self.world} did not answer in {TIMEOUT} s")
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    good, value, kept = _deserialize(pipe.recv_bytes())
                except EOFError:
                    self._fail(f"rank {rank} of {self.world} died")
                if not good:
                    self._fail(f"rank {rank} of {self.world}:\n{value}")
                results[rank], groups = value, max(groups, kept)
        if groups > MOST_GROUPS:
            self.close()
        return [results[rank] for rank in range(self.world)]

    def close(self) -> None:
        """Kill the processes."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.world):
            parent_end, child_end = SERVER.Pipe()
            process = SERVER.Process(target=_work, args=(rank, self.world, str(store), child_end), daemon=True)
            process.start()
            child_end.close()
            self._workers.append((process, parent_end))

    def _fail(self, reason: str) -> None:
        self.close()
        raise AssertionError(reason)


def _work(rank: int, world: int, store: str, pipe: Connection) -> None:
    from trinity.parallel import mesh  # imports Triton, for which the root conftest sets TRITON_INTERPRET first

    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(
        logging.ERROR
    )  # its warning that gathering is slow
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT)
    )
    # equal meshes are made once
    device_mesh.init_device_mesh = dist.init_device_mesh = mesh.init_device_mesh = cache(device_mesh.init_device_mesh)
    while True:
        try:
            module, name, args = _deserialize(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):  # the parent closed the pipe
            return
        try:
            answer = True, getattr(importlib.import_module(module), name)(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send_bytes(_serialize((*answer, len(dist.distributed_c10d._world.pg_map))))


def _serialize(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _deserialize(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
