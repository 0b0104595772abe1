"""Checkpoints: torch.distributed.checkpoint of tensors only, made true by one file written last.

checkpoints/step_00000100/ holds the library's files and COMPLETE, a list of them with their sizes. A folder without
COMPLETE, or with a file of another size, does not count. `latest` is a hint for people.

One flat dictionary of tensors is the whole state: model.<name>, optim.<…>, data.<stream>, run.<counter>.
"""

import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from trinity.config.run import Kernels, Parallel, RunConfig
from trinity.errors import UserError
from trinity.models.trinity import Trinity
from trinity.parallel import mesh
from trinity.parallel.agree import on_first
from trinity.training.run_directory import newest_config, write_whole
from trinity.training.setup import build_model

State = dict[str, Tensor]


def step_folder(run_directory: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lives."""
    return run_directory / "checkpoints" / f"step_{step:08d}"


def save(state: State, run_directory: Path, step: int, keep: int) -> Path:
    """Write a checkpoint, then remove all but the newest `keep` complete ones; every rank calls this.

    An older checkpoint is removed only once the new one is complete.
    """
    folder = step_folder(run_directory, step)
    on_first(lambda: shutil.rmtree(folder) if folder.exists() else None)  # left by a run that died while writing it
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True))
    on_first(lambda: _finish(folder, keep))
    return folder


def _finish(folder: Path, keep: int) -> None:
    run_directory = folder.parents[1]
    _complete(folder)
    write_whole(run_directory / "checkpoints" / "latest", folder.name + "\n")
    for step_done in complete_steps(run_directory)[:-keep]:
        _remove(step_folder(run_directory, step_done))


def _complete(folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    write_whole(folder / "COMPLETE", json.dumps({"files": sizes}) + "\n")
    descriptor = os.open(folder, os.O_RDONLY)  # the names too must be on disk before anything older goes
    os.fsync(descriptor)
    os.close(descriptor)


def _remove(folder: Path) -> None:
    (folder / "COMPLETE").unlink()  # first: a deletion that is cut off must not leave a folder that looks whole
    shutil.rmtree(folder)


def complete_steps(run_directory: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    numbers = (path.name.removeprefix("step_") for path in (run_directory / "checkpoints").glob("step_*"))
    steps = [int(number) for number in numbers if number.isdecimal()]
    return sorted(step for step in steps if is_complete(step_folder(run_directory, step)))


def is_complete(folder: Path) -> bool:
    """Whether COMPLETE is there and every file that it lists has its size."""
    try:
        sizes = json.loads((folder / "COMPLETE").read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def load(state: State, run_directory: Path, step: int) -> None:
    """Fill the given tensors in place, whatever mesh they were saved on.

    Raises:
        UserError: the checkpoint lacks a tensor, or holds it in another shape.
    """
    folder = step_folder(run_directory, step)
    # a copy: the library wants to write its own references into the dictionary
    wanted = dict(state)
    alone = not dist.is_initialized()
    try:
        with warnings.catch_warnings():
            # a tool that reads a run alone means to: torch warns of it
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(wanted, storage_reader=dcp.FileSystemReader(folder), no_dist=alone)
    except (RuntimeError, ValueError, dcp.CheckpointException) as error:
        reason = " ".join(str(error).split())[-300:]
        raise UserError(f"{folder} does not fit this run's config: {reason}") from None


def tensors_of(folder: Path, prefix: str) -> State:
    """Empty tensors of the names that begin so in a checkpoint, shaped as they were saved, to be filled by load."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in metadata.items()
        if name.startswith(prefix)
    }


def model_state(model: Trinity) -> State:
    """Parameters and balancing state, by name."""
    return {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}


def pick_step(run_directory: Path, step: int | None) -> int:
    """The asked-for or newest complete checkpoint.

    Raises:
        UserError: there is none, or not that one.
    """
    steps = complete_steps(run_directory)
    if not steps:
        raise UserError(f"{run_directory} has no complete checkpoint")
    if step is None:
        return steps[-1]
    if step not in steps:
        raise UserError(f"{run_directory} has no complete checkpoint of step {step}; it has {steps}")
    return step


def load_model(run_dir: Path, step: int | None = None) -> tuple[Trinity, RunConfig, int]:
    """The model of a run's checkpoint, unsharded on the CPU in its master precision.

    Returns:
        model, the run's config, the checkpoint's step.
    Raises:
        UserError: not a run directory, or no complete checkpoint.
    """
    config = newest_config(Path(run_dir))
    chosen = pick_step(Path(run_dir), step)
    model = Trinity(config.model)
    if config.precision.compute == "float64":
        model.double()
    load(model_state(model), Path(run_dir), chosen)
    return model, config, chosen


def load_sharded_model(run_dir: Path, step: int | None = None) -> tuple[Trinity, RunConfig, int]:
    """As load_model, but over all processes of this launch, each of which holds a part; it starts their group.

    Raises:
        UserError: not a run directory, no complete checkpoint, or processes over which the experts cannot be cut.
    """
    config = newest_config(Path(run_dir))
    chosen = pick_step(Path(run_dir), step)
    parallel = Parallel()  # whatever mesh it was saved on
    mesh.check_parallel(parallel, config.model, mesh.world_size())
    ranks = mesh.start(parallel, config.model, config.run.threads, False)
    # how the run is done does not matter here, and may not be possible
    precision = replace(config.precision, fp8="none")
    plain = replace(config, parallel=parallel, recompute="none", compile="none", kernels=Kernels(), precision=precision)
    model = build_model(plain, ranks)
    load(model_state(model), Path(run_dir), chosen)
    return model, config, chosen
