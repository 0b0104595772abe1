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
from trinity.errors import Failure, UserError
from trinity.io.remote_path import Place
from trinity.models.trinity import Trinity
from trinity.parallel import mesh
from trinity.parallel.agree import together
from trinity.run_directory import newest_config
from trinity.training.checkpoint_folder import (
    Home,
    Note,
    complete_steps,
    folder_of,
    home_of,
    is_complete,
    newest_intact,
    pick_intact,
    pick_step,
    step_folder,
    warn,
)
from trinity.training.saver import Saver, State, told, write
from trinity.training.setup import build_model
from trinity.training.stored import Reader

__all__ = [
    "Home", "Note", "Saver", "State", "check_home", "complete_steps", "folder_of", "home_of", "home_of_run",
    "is_complete", "load", "load_model", "load_sharded_model", "model_state", "newest_intact", "pick_intact",
    "pick_step", "read_alone", "save", "step_folder", "tensors_of",
]  # fmt: skip


def home_of_run(run_directory: Path) -> Home:
    """Whose checkpoints those of a run are, by the config of its last start.

    Raises:
        UserError: not a run directory, or a URL that nothing here can open.
    """
    return home_of(newest_config(run_directory).checkpoint.url, run_directory)


def check_home(home: Home, before: RunConfig | None, run_directory: Path) -> None:
    """Refuse to begin anew, or to go back, because checkpoint.url is another one, and to go on with another run's.

    Args:
        home: where the checkpoints of this start are and will be.
        before: config of the run's last start; None where the run directory has none.
    Raises:
        UserError: naming the places.
    """
    done = complete_steps(home)
    if before is None:
        if done:
            raise UserError(
                f"{folder_of(home)} holds checkpoints, and {run_directory} has no config.yaml that says of which run; "
                "put that file back, or give another run.dir or checkpoint.url"
            )
        return
    left = home_of(before.checkpoint.url, run_directory)
    if folder_of(left) == folder_of(home):
        return
    here, there = max(done, default=0), max(complete_steps(left), default=0)
    if here < there:
        raise UserError(
            f"the checkpoints of {run_directory} are in {folder_of(left)} up to step {there}, and in "
            f"{folder_of(home)} up to step {here}; copy them there or give the old checkpoint.url back"
        )


def save(state: State, home: Home, step: int, keep: int, keep_every: int = 0) -> Place:
    """Write a checkpoint and wait for it, then remove all but the newest `keep` complete ones; every rank calls this.

    An older checkpoint is removed only once the new one is complete, and never where its step is a multiple of
    `keep_every`.

    Raises:
        Failure, UserError: it could not be written on some rank; the older ones are as they were.
    """
    write(state, home, step, keep, keep_every, group=None)
    return step_folder(home, step)


def load(state: State, home: Home, step: int) -> None:
    """Fill the given tensors in place, whatever mesh they were saved on; every rank calls this.

    Checksums are not looked at: pick_intact and newest_intact did, once for all that is loaded.

    Raises:
        UserError: the checkpoint lacks a tensor, holds it in another shape, or cannot be read.
        Failure: it lies elsewhere, and cannot be reached.
    """
    folder = step_folder(home, step)
    _read(state, folder, together(lambda: Reader(folder)), alone=not dist.is_initialized())


def read_alone(folder: Place, prefix: str) -> State:
    """The small tensors whose names begin so in a checkpoint, read by this process without the others.

    Raises:
        UserError: it cannot be read.
        Failure: it lies elsewhere, and cannot be reached.
    """
    state = tensors_of(folder, prefix)
    if state:
        _read(state, folder, Reader(folder), alone=True)
    return state


def _read(state: State, folder: Place, reader: Reader, alone: bool) -> None:
    # a copy: the library wants to write its own references into the dictionary
    wanted = dict(state)
    try:
        with warnings.catch_warnings():
            # a tool that reads a run alone means to: torch warns of it
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(wanted, storage_reader=reader, no_dist=alone)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError, dcp.CheckpointException) as error:
        if isinstance(error, dcp.CheckpointException):  # its text is the traceback of every rank
            if isinstance(failure := told(error), Failure):
                raise failure from None
            error = next(iter(error.failures.values()))[0]
        if isinstance(error, pickle.UnpicklingError):  # whose text is advice to trust the file
            raise UserError(f"{folder} is damaged (a tensor in it cannot be read); use another checkpoint") from None
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{folder} does not fit this run's config: {reason}") from None


def tensors_of(folder: Place, prefix: str | tuple[str, ...]) -> State:
    """Empty tensors of the names in a checkpoint that begin with a prefix, shaped as they were saved, for load to fill.

    Args:
        folder: of the checkpoint.
        prefix: one, or several.
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
    home = home_of(config.checkpoint.url, Path(run_dir))
    chosen = pick_intact(home, step, note)
    with torch.device("meta"):  # every value comes from the checkpoint
        model = Trinity(config.model)
    if config.precision.compute == "float64":
        model.double()
    model.to_empty(device="cpu")
    load(model_state(model), home, chosen)
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
    home = home_of(config.checkpoint.url, Path(run_dir))
    chosen = pick_intact(home, step, note)
    # how the run is done does not matter here, and may not be possible
    precision = replace(config.precision, fp8="none")
    plain = replace(config, parallel=parallel, recompute="none", compile="none", kernels=Kernels(), precision=precision)
    model = build_model(plain, ranks)
    load(model_state(model), home, chosen)
    return model, config, chosen
