"""Load the model of a run's checkpoint: unsharded on the CPU, or sharded over all processes."""

from dataclasses import replace
from pathlib import Path

import torch

from trinity.checkpoint.directory import CheckpointDirectory, Note, warn
from trinity.checkpoint.load import load, model_state
from trinity.config.run import KernelsConfig, ParallelConfig, RunConfig
from trinity.models.trinity import Trinity
from trinity.parallel import mesh
from trinity.run_directory import newest_config
from trinity.training.build import build_model


def load_model(run_dir: Path, step: int | None = None, note: Note = warn) -> tuple[Trinity, RunConfig, int]:
    """Load the model of a run's checkpoint, unsharded on the CPU, in its master precision.

    Args:
        run_dir: the run directory.
        step: the checkpoint's step; None: the newest intact one.
        note: called for each damaged checkpoint that is skipped.
    Returns:
        model, the run's config, the checkpoint's step.
    Raises:
        UserError: not a run directory, or no complete checkpoint.
    """
    config = newest_config(Path(run_dir))
    checkpoints = CheckpointDirectory.at(Path(run_dir), config.checkpoint.url)
    chosen = checkpoints.pick_intact(step, note)
    with torch.device("meta"):  # every value comes from the checkpoint
        model = Trinity(config.model)
    if config.precision.compute == "float64":
        model.double()
    model.to_empty(device="cpu")
    load(model_state(model), checkpoints.path_of(chosen))
    return model, config, chosen


def load_sharded_model(run_dir: Path, step: int | None = None, note: Note = warn) -> tuple[Trinity, RunConfig, int]:
    """Load the model like load_model, but sharded over all processes of this launch; starts the process group.

    Raises:
        UserError: not a run directory, no complete checkpoint, or a number of processes that cannot shard the experts.
    """
    config = newest_config(Path(run_dir))
    parallel = ParallelConfig()  # a checkpoint loads on any mesh
    mesh.check_parallel(parallel, config.model, mesh.world_size())
    ranks = mesh.start(parallel, config.model, config.run.threads, False)
    checkpoints = CheckpointDirectory.at(Path(run_dir), config.checkpoint.url)
    chosen = checkpoints.pick_intact(step, note)
    # without the run's fp8, recompute, compile and kernels: this machine may lack them
    precision = replace(config.precision, fp8="none")
    portable_config = replace(
        config, parallel=parallel, recompute="none", compile="none", kernels=KernelsConfig(), precision=precision
    )
    model = build_model(portable_config, ranks)
    load(model_state(model), checkpoints.path_of(chosen))
    return model, config, chosen
