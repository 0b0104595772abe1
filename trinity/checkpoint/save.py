"""Writing a checkpoint: by the library's collective save, in the training's own time or behind its back.

    training  ──step──[copy]──step──step──step──…         [copy]: to host memory, all that training waits for
    thread             └─files, fsync, checksums──(all ranks)──COMPLETE, old ones go

The thread talks to the other ranks over a gloo group of its own, so that its messages never meet the training's. The
library passes what fails on one rank on to all, in every phase; what the first rank does once all have written
(COMPLETE, removal) is part of its last phase, so that all ranks know how a save ended before any of them goes on.

A file on a disk is summed as it reads back. To read one back from elsewhere would be a download: it is summed as it
goes out, and its size there is looked at before COMPLETE.

Memory: a copy of this rank's part of the state stays on the host for the life of the run (pinned where there is a GPU),
because memory that has been used before is filled several times faster than new memory.
"""

import io
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from trinity.checkpoint.checkpoint import METADATA, Checkpoint
from trinity.checkpoint.directory import CheckpointDirectory, Note, warn
from trinity.config.run import CheckpointConfig
from trinity.errors import USER_MISTAKE, Failure, UserError, explain
from trinity.io.checksum import FileSum, sum_of
from trinity.io.local import make_folder
from trinity.io.remote_path import AnyPath, RemoteFileSystem, RemotePath
from trinity.parallel.collectives import run_on_rank0

State = dict[str, Tensor]
Written = tuple[list[WriteResult], dict[str, FileSum]]

SLOWEST_SAVE = timedelta(minutes=30)
"""How long a rank may wait for another one's files."""


class Saver:
    """Writes the checkpoints of one run, one at a time; every rank makes one and calls it at the same steps.

    Args:
        checkpoints: where they are written.
        settings: when asynchronous, how many stay.
        note: told on the first rank of each checkpoint that is complete, of a disk that is nearly full, and of a save
            that failed when nobody waits for it any more.
        beat: called every second that training waits for files, so that slow storage does not look like a rank that
            hangs; SLOWEST_SAVE ends that.
    """

    def __init__(
        self,
        checkpoints: CheckpointDirectory,
        settings: CheckpointConfig,
        note: Note = warn,
        beat: Callable[[str], None] = lambda doing: None,
    ) -> None:
        self._checkpoints, self._settings, self._note, self._beat = checkpoints, settings, note, beat
        self._group = dist.new_group(backend="gloo", timeout=SLOWEST_SAVE)
        self._copy: State = {}
        self._thread: Thread | None = None
        self._failure: BaseException | None = None

    def save(self, state: State, step: int) -> float:
        """Write a checkpoint of this state; the caller may change its tensors as soon as this returns.

        Returns:
            seconds that training stood still.
        Raises:
            Failure, UserError: this save, or the one before it that was still in flight, could not be written.
        """
        began = time.perf_counter()
        self.wait()
        run_on_rank0(self._check_space)
        if self._settings.asynchronous:
            state = self._copy = on_host(state, self._copy)
        self._thread = Thread(target=self._write, args=(state, step), name="checkpoint", daemon=True)
        self._thread.start()
        if not self._settings.asynchronous:
            self.wait()
        return time.perf_counter() - began

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save in flight has failed: it will on all, and wait says so."""
        return self._failure is not None

    def wait(self) -> None:
        """Until nothing is in flight.

        Raises:
            Failure, UserError: the save that was could not be written; the same on every rank.
        """
        while self._thread is not None:
            self._thread.join(timeout=1)
            self._beat("waiting for the files of a checkpoint")
            if not self._thread.is_alive():
                self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Wait, and leave the group; whoever has not waited before hears of a failure only by `note`."""
        try:
            self.wait()
        except (Exception, dcp.CheckpointException) as error:  # what ends the run must not be hidden by this
            if _is_first():
                with suppress(OSError):
                    self._note("checkpoint_damaged", f"the last checkpoint could not be written: {error}")
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _write(self, state: State, step: int) -> None:
        """In the thread."""
        began = time.perf_counter()
        try:
            save(state, self._checkpoints, step, self._settings.keep, self._settings.keep_every, self._group)
        except BaseException as error:
            self._failure = error
            return
        if _is_first():
            seconds = time.perf_counter() - began
            with suppress(OSError, Failure):  # an event that cannot be written does not undo a checkpoint
                size = self._checkpoints.checkpoint(step).size()
                sentence = f"step {step} is complete: {size / 1e9:.3g} GB written in {seconds:.1f} s"
                self._note("checkpoint", sentence, step=step, bytes=size, seconds=seconds)

    def _check_space(self) -> None:
        """Say so where two checkpoints like the last one do not fit: the next one may, what comes after it may not."""
        folder = self._checkpoints.folder
        steps = [] if isinstance(folder, RemotePath) else self._checkpoints.complete_steps()
        if isinstance(folder, RemotePath) or not steps:
            return
        size, free = self._checkpoints.checkpoint(steps[-1]).size(), shutil.disk_usage(folder).free
        if free < 2 * size:
            self._note(
                "disk",
                f"{self._checkpoints} has {free / 1e9:.3g} GB left and a checkpoint takes {size / 1e9:.3g} GB; "
                "free some space or lower checkpoint.keep",
            )


def save(
    state: State,
    checkpoints: CheckpointDirectory,
    step: int,
    keep: int,
    keep_every: int = 0,
    group: dist.ProcessGroup | None = None,
) -> AnyPath:
    """Write a checkpoint and wait for it, then delete those that the retention policy no longer keeps.

    Every rank calls this. An older checkpoint is deleted only once the new one is complete.

    Args:
        state: tensors and DTensors by name.
        checkpoints: where to.
        step: the steps made so far.
        keep, keep_every: see CheckpointDirectory.retain.
        group: process group for the collectives; None: the default one.
    Returns:
        The checkpoint's folder.
    Raises:
        Failure, UserError: a rank could not write: the same sentence on all ranks. The older checkpoints are unchanged.
    """
    writer = Writer(checkpoints, step, keep, keep_every)
    try:
        dcp.save(state, storage_writer=writer, process_group=group)
    except dcp.CheckpointException as error:
        raise told(error) from None
    return checkpoints.path_of(step)


def told(error: dcp.CheckpointException) -> BaseException:
    """What the first rank that failed has to say, the same on all; the error itself where that is a mistake of ours."""
    rank, (cause, _) = min(error.failures.items())
    explained = explain(cause)
    if explained is None:
        return error
    code, sentence = explained
    kind = UserError if code == USER_MISTAKE else Failure
    return kind(f"rank {rank}: {sentence}" if rank else sentence)


class _Remembered(io.FileIO):
    """A file that keeps the first error of a write."""

    failure: OSError | None = None
    _write = io.FileIO.write

    def write(self, data: Any) -> int:
        try:
            return self._write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise


class LocalFiles(FileSystem):
    """The library's local file system, but a write that fails raises what the system said, such as a full disk.

    torch.save, whose zip writer goes on after such an error, would raise a RuntimeError of its own.
    """

    @contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator[io.IOBase]:
        """A file to be read or written."""
        raw = _Remembered(path, mode)
        try:
            with io.BufferedWriter(raw) if mode == "wb" else io.BufferedReader(raw) as stream:
                yield stream
        except Exception:
            if raw.failure is not None:
                raise raw.failure from None
            raise


class Writer(dcp.FileSystemWriter):
    """The library's writer of one file a rank, which also sums what it wrote and decides what a checkpoint is."""

    def __init__(self, checkpoints: CheckpointDirectory, step: int, keep: int, keep_every: int) -> None:
        folder = checkpoints.path_of(step)
        local = isinstance(folder, Path)
        super().__init__(str(folder), single_file_per_rank=True, sync_files=local)
        self.path = folder
        self.fs = LocalFiles() if local else RemoteFileSystem()
        self.step = step
        self._checkpoints, self._keep, self._keep_every = checkpoints, keep, keep_every

    @property
    def checkpoint_id(self) -> str:
        """What .metadata says of where it was saved."""
        return str(self.path)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """On every rank; it makes no folder, which the first rank may be about to clean."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the first rank, before anyone writes: a folder without what an earlier attempt left in it."""
        if self.path.exists():
            Checkpoint(self.path).remove()
        if isinstance(self.path, Path):
            make_folder(self.path)
        else:
            self.path.mkdir()
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Written]:
        """On every rank: its file, and the sum of it."""
        results = super().write_data(plan, planner).value()
        names = {result.storage_data.relative_path for result in results}
        done: Future[Written] = Future()
        done.set_result((results, {name: self._sum(name) for name in names}))
        return done

    def _sum(self, name: str) -> FileSum:
        return self.fs.sums[name] if isinstance(self.fs, RemoteFileSystem) else sum_of(self.path / name)

    def finish(self, metadata: Metadata, results: list[Written]) -> None:
        """On the first rank, once every rank has written."""
        super().finish(metadata, [result for result, _ in results])
        sums = {METADATA: self._sum(METADATA)}
        for _, found in results:
            sums |= found
        checkpoint = Checkpoint(self.path)
        if isinstance(self.fs, RemoteFileSystem):
            checkpoint.check_sizes(sums)
        checkpoint.mark_complete(sums)
        self._checkpoints.retain(self.step, self._keep, self._keep_every)


@torch.no_grad()
def on_host(state: State, into: State) -> State:
    """A copy of every tensor in host memory, each rank's part alone.

    Args:
        state: tensors and DTensors on any device.
        into: an earlier copy, whose memory is used again where shapes are the same.
    """
    copy = {}
    for name, tensor in state.items():
        kept = into.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        _local(kept).copy_(_local(tensor), non_blocking=True)
        copy[name] = kept
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copy


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
