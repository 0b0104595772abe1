"""Save a checkpoint with torch.distributed.checkpoint: synchronously, or asynchronously in a background thread.

    training  ──step──[copy]──step──step──step──…         [copy]: to host memory; training waits for nothing else
    thread             └─write files, fsync, checksums──(all ranks)──write COMPLETE, delete old checkpoints

The thread's collectives go over a gloo group of its own, so they never mix with those of training. In every phase of
the library's save, an error on one rank reaches all ranks. COMPLETE and the deletion of old checkpoints are part of its
last phase, on rank 0; so every rank knows how a save ended before any rank goes on.

The checksum of a local file is computed by reading it back. Reading back a remote file would download it: its checksum
is computed while it is uploaded, and its size in the store is compared before COMPLETE is written.

Memory: a host copy of this rank's part of the state is kept for the life of the run (pinned where there is a GPU),
because memory that has been used before is filled several times faster than new memory.
"""

import shutil
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from trinity.checkpoint.checkpoint import METADATA
from trinity.checkpoint.directory import CheckpointDirectory, Note, averaged_steps, warn
from trinity.checkpoint.file_systems import LocalFileSystem, RemoteFileSystem
from trinity.config.run import CheckpointConfig
from trinity.errors import USER_MISTAKE, Failure, UserError, explain
from trinity.io.checksum import FileSum, checksum_file
from trinity.io.local import make_folder
from trinity.io.remote_path import AnyPath, RemotePath
from trinity.parallel.collectives import run_on_rank0

State = dict[str, Tensor]
"""Tensors and DTensors by name: what a checkpoint holds."""

RankResult = tuple[list[WriteResult], dict[str, FileSum]]
"""What each rank reports to rank 0 once its file is written: the library's results, and the file's size and crc32."""

SAVE_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another rank's files."""


class Saver:
    """Saves the checkpoints of one run, one at a time; every rank makes one and calls it at the same steps.

    Args:
        checkpoints: the run's checkpoint directory.
        settings: whether saves are asynchronous, and the retention policy.
        note: called on rank 0 for each complete checkpoint, for a disk that is nearly full, and by close() for a save
            that failed.
        beat: called every second while training waits for files, so that the heartbeat does not take slow storage for
            a rank that hangs. SAVE_TIMEOUT limits the wait.
    """

    def __init__(
        self,
        checkpoints: CheckpointDirectory,
        settings: CheckpointConfig,
        note: Note = warn,
        beat: Callable[[str], None] = lambda activity: None,
    ) -> None:
        self._checkpoints, self._settings, self._note, self._beat = checkpoints, settings, note, beat
        self._group: dist.ProcessGroup | None = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
        self._host_copy: State = {}
        self._thread: Thread | None = None
        self._failure: BaseException | None = None

    def save(self, state: State, step: int) -> float:
        """Save this state; the caller may change its tensors as soon as this returns.

        Returns:
            seconds that training stood still.
        Raises:
            Failure, UserError: this save failed, or the previous one, which was still in flight.
        """
        began = time.perf_counter()
        self.wait()
        run_on_rank0(self._warn_of_low_space)
        if self._settings.asynchronous:
            state = self._host_copy = copy_to_host(state, self._host_copy)
        self._thread = Thread(target=self._save_in_thread, args=(state, step), name="checkpoint", daemon=True)
        self._thread.start()
        if not self._settings.asynchronous:
            self.wait()
        return time.perf_counter() - began

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save in flight failed. It then fails on all ranks, and wait() raises."""
        return self._failure is not None

    def wait(self) -> None:
        """Wait until no save is in flight.

        Raises:
            Failure, UserError: the save failed; the same error on every rank.
        """
        while self._thread is not None:
            self._thread.join(timeout=1)
            self._beat("waiting for the files of a checkpoint")
            if not self._thread.is_alive():
                self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def idle_buffers(self) -> State:
        """The host copy of the last save, for another use until the next one; empty with synchronous saves.

        Raises:
            Failure, UserError: the save in flight failed.
        """
        self.wait()
        return self._host_copy

    def close(self) -> None:
        """Wait for the save in flight, and destroy the process group. `note` gets a failed save; nothing is raised."""
        try:
            self.wait()
        except (Exception, dcp.CheckpointException) as error:  # must not hide the error that ends the run
            if _is_rank0():
                with suppress(OSError):
                    self._note("checkpoint_damaged", f"the last checkpoint could not be written: {error}")
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _save_in_thread(self, state: State, step: int) -> None:
        began = time.perf_counter()
        try:
            averaged = averaged_steps(self._settings.average, step)
            save(state, self._checkpoints, step, self._settings.keep, self._settings.keep_every, self._group, averaged)
        except BaseException as error:
            self._failure = error
            return
        if _is_rank0():
            seconds = time.perf_counter() - began
            with suppress(OSError, Failure):  # the checkpoint is complete, whether or not its event can be written
                size = self._checkpoints.checkpoint(step).size()
                message = f"step {step} is complete: {size / 1e9:.3g} GB written in {seconds:.1f} s"
                self._note("checkpoint", message, step=step, bytes=size, seconds=seconds)

    def _warn_of_low_space(self) -> None:
        """Report a disk with less space than two checkpoints like the last one: the save after the next may not fit."""
        folder = self._checkpoints.folder
        if isinstance(folder, RemotePath):
            return
        steps = self._checkpoints.complete_steps()
        if not steps:
            return
        size, free = self._checkpoints.checkpoint(steps[-1]).size(), shutil.disk_usage(folder).free
        if free < 2 * size:
            self._note(
                "disk",
                f"{self._checkpoints} has {free / 1e9:.3g} GB left and a checkpoint takes {size / 1e9:.3g} GB; "
                "free some space or lower checkpoint.keep",
            )


@torch.no_grad()
def copy_to_host(state: State, buffers: State) -> State:
    """Copy every tensor to host memory; of a DTensor, this rank's shard.

    Args:
        state: tensors and DTensors on any device.
        buffers: an earlier copy, whose memory is reused for tensors of the same shape and dtype.
    """
    copy = {}
    for name, tensor in state.items():
        buffer = buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        local_shard(buffer).copy_(local_shard(tensor), non_blocking=True)
        copy[name] = buffer
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copy


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds: all of it, but for a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save(
    state: State,
    checkpoints: CheckpointDirectory,
    step: int,
    keep: int,
    keep_every: int = 0,
    group: dist.ProcessGroup | None = None,
    averaged: Collection[int] = (),
) -> AnyPath:
    """Write a checkpoint and wait for it, then delete those that the retention policy no longer keeps.

    Every rank calls this. An older checkpoint is deleted only once the new one is complete.

    Args:
        state: tensors and DTensors by name.
        checkpoints: the run's checkpoint directory.
        step: the steps made so far.
        keep, keep_every, averaged: see CheckpointDirectory.retain.
        group: process group for the collectives; None: the default one.
    Returns:
        The checkpoint's folder.
    Raises:
        Failure, UserError: a rank could not write: the same sentence on all ranks. The older checkpoints are unchanged.
    """
    writer = Writer(checkpoints, step, keep, keep_every, averaged)
    try:
        dcp.save(state, storage_writer=writer, process_group=group)
    except dcp.CheckpointException as error:
        raise first_failure(error) from None
    return checkpoints.path_of(step)


def first_failure(error: dcp.CheckpointException) -> BaseException:
    """The error of the first rank that failed, as one sentence, the same on all ranks; `error` itself for a bug."""
    rank, (cause, _) = min(error.failures.items())
    explained = explain(cause)
    if explained is None:
        return error
    code, sentence = explained
    kind = UserError if code == USER_MISTAKE else Failure
    return kind(f"rank {rank}: {sentence}" if rank else sentence)


def _is_rank0() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


class Writer(dcp.FileSystemWriter):
    """The library's writer with one file per rank. It also computes checksums, writes COMPLETE and applies retention.

    The library calls the methods in this order.
    """

    def __init__(
        self,
        checkpoints: CheckpointDirectory,
        step: int,
        keep: int,
        keep_every: int,
        averaged: Collection[int] = (),
    ) -> None:
        self._checkpoints, self.step = checkpoints, step
        self._keep, self._keep_every, self._averaged = keep, keep_every, averaged
        self._checkpoint = checkpoints.checkpoint(step)
        folder = self._checkpoint.path
        super().__init__(str(folder), single_file_per_rank=True, sync_files=isinstance(folder, Path))
        self._remote = None if isinstance(folder, Path) else RemoteFileSystem()
        self.path = cast(Path, folder)  # the library hands a RemotePath to self.fs alone
        self.fs = self._remote or LocalFileSystem()  # type: ignore[assignment]  # it calls FileSystemBase's methods only

    @property
    def checkpoint_id(self) -> str:
        """The folder's name, which the library stores in .metadata."""
        return str(self._checkpoint.path)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """On every rank. The library would make the folder here, which rank 0 may be about to delete."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0, before any rank writes: make an empty folder, without the files of an earlier attempt."""
        folder = self._checkpoint.path
        if folder.exists():
            self._checkpoint.remove()
        if isinstance(folder, Path):
            make_folder(folder)
        else:
            folder.mkdir()
        return super().prepare_global_plan(plans)

    # the library passes each rank's result on to finish() without looking at it
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[RankResult]:  # type: ignore[override]
        """On every rank: write its file and compute its checksum."""
        results = super().write_data(plan, planner).value()
        names = {result.storage_data.relative_path for result in results}
        future: Future[RankResult] = Future()
        future.set_result((results, {name: self._sum(name) for name in names}))
        return future

    def _sum(self, name: str) -> FileSum:
        return self._remote.sums[name] if self._remote else checksum_file(self._checkpoint.path / name)

    def finish(self, metadata: Metadata, results: list[RankResult]) -> None:  # type: ignore[override]
        """On rank 0, once every rank has written: write .metadata and COMPLETE, then delete old checkpoints."""
        super().finish(metadata, [result for result, _ in results])
        sums = {METADATA: self._sum(METADATA)}
        for _, rank_sums in results:
            sums |= rank_sums
        if self._remote:
            self._checkpoint.check_sizes(sums)
        self._checkpoint.mark_complete(sums)
        self._checkpoints.retain(self.step, self._keep, self._keep_every, self._averaged)
