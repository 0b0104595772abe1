"""Checkpoints: torch.distributed.checkpoint of tensors only, made true by one file written last.

One flat dictionary of tensors is the whole state: model.<name>, optim.<…>, data.<stream>, run.<counter>.

checkpoint_folder.py says what a folder must hold to count, saver.py writes one, stored.py reads the library's pickle
with care; here is what the rest of the project calls.
"""

import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from trinity.config.run import Kernels, Parallel, RunConfig
from trinity.errors import UserError
from trinity.models.trinity import Trinity
from trinity.parallel import mesh
from trinity.parallel.agree import together
from trinity.training.checkpoint_folder import (
    Note,
    complete_steps,
    is_complete,
    newest_intact,
    pick_intact,
    pick_step,
    step_folder,
    warn,
)
from trinity.training.run_directory import newest_config
from trinity.training.saver import Saver, State, write
from trinity.training.setup import build_model
from trinity.training.stored import Reader

__all__ = [
    "Note", "Saver", "State", "complete_steps", "is_complete", "load", "load_model", "load_sharded_model",
    "model_state", "newest_intact", "pick_intact", "pick_step", "save", "step_folder", "tensors_of",
]  # fmt: skip


def save(state: State, run_directory: Path, step: int, keep: int, keep_every: int = 0) -> Path:
    """Write a checkpoint and wait for it, then remove all but the newest `keep` complete ones; every rank calls this.

    An older checkpoint is removed only once the new one is complete, and never where its step is a multiple of
    `keep_every`.

    Raises:
        Failure, UserError: it could not be written on some rank; the older ones are as they were.
    """
    write(state, run_directory, step, keep, keep_every, group=None)
    return step_folder(run_directory, step)


def load(state: State, run_directory: Path, step: int) -> None:
    """Fill the given tensors in place, whatever mesh they were saved on; every rank calls this.

    Checksums are not looked at: pick_intact and newest_intact did, once for all that is loaded.

    Raises:
        UserError: the checkpoint lacks a tensor, holds it in another shape, or cannot be read.
    """
    folder = step_folder(run_directory, step)
    reader = together(lambda: Reader(folder))
    # a copy: the library wants to write its own references into the dictionary
    wanted = dict(state)
    alone = not dist.is_initialized()
    try:
        with warnings.catch_warnings():
            # a tool that reads a run alone means to: torch warns of it
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(wanted, storage_reader=reader, no_dist=alone)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError, dcp.CheckpointException) as error:
        if isinstance(error, dcp.CheckpointException):  # its text is the traceback of every rank
            error = next(iter(error.failures.values()))[0]
        if isinstance(error, pickle.UnpicklingError):  # whose text is advice to trust the file
            raise UserError(f"{folder} is damaged (a tensor in it cannot be read); use another checkpoint") from None
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{folder} does not fit this run's config: {reason}") from None


def tensors_of(folder: Path, prefix: str) -> State:
    """Empty tensors of the names that begin so in a checkpoint, shaped as they were saved, to be filled by load.

    Raises:
        UserError: its .metadata is damaged, or names something else than tensors and files.
    """
    metadata = Reader(folder).read_metadata().state_dict_metadata
    return {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in metadata.items()
        if name.startswith(prefix)
    }


def model_state(model: Trinity) -> State:
    """Parameters and balancing state, by name."""
    return {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}


def load_model(run_dir: Path, step: int | None = None, note: Note = warn) -> tuple[Trinity, RunConfig, int]:
    """The model of a run's checkpoint, unsharded on the CPU in its master precision.

    Args:
        run_dir: the run.
        step: which; None: the newest that is not damaged.
        note: told of damaged ones that are passed over.
    Returns:
        model, the run's config, the checkpoint's step.
    Raises:
        UserError: not a run directory, or no complete checkpoint.
    """
    config = newest_config(Path(run_dir))
    chosen = pick_intact(Path(run_dir), step, note)
    model = Trinity(config.model)
    if config.precision.compute == "float64":
        model.double()
    load(model_state(model), Path(run_dir), chosen)
    return model, config, chosen


def load_sharded_model(run_dir: Path, step: int | None = None, note: Note = warn) -> tuple[Trinity, RunConfig, int]:
    """As load_model, but over all processes of this launch, each of which holds a part; it starts their group.

    Raises:
        UserError: not a run directory, no complete checkpoint, or processes over which the experts cannot be cut.
    """
    config = newest_config(Path(run_dir))
    parallel = Parallel()  # whatever mesh it was saved on
    mesh.check_parallel(parallel, config.model, mesh.world_size())
    ranks = mesh.start(parallel, config.model, config.run.threads, False)
    chosen = pick_intact(Path(run_dir), step, note)
    # how the run is done does not matter here, and may not be possible
    precision = replace(config.precision, fp8="none")
    plain = replace(config, parallel=parallel, recompute="none", compile="none", kernels=Kernels(), precision=precision)
    model = build_model(plain, ranks)
    load(model_state(model), Path(run_dir), chosen)
    return model, config, chosen
