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
    """As load_model, but over all processes of this launch, each of which holds a part; it starts their group.

    Raises:
        UserError: not a run directory, no complete checkpoint, or processes over which the experts cannot be cut.
    """
    config = newest_config(Path(run_dir))
    parallel = ParallelConfig()  # whatever mesh it was saved on
    mesh.check_parallel(parallel, config.model, mesh.world_size())
    ranks = mesh.start(parallel, config.model, config.run.threads, False)
    checkpoints = CheckpointDirectory.at(Path(run_dir), config.checkpoint.url)
    chosen = checkpoints.pick_intact(step, note)
    # how the run is done does not matter here, and may not be possible
    precision = replace(config.precision, fp8="none")
    plain = replace(
        config, parallel=parallel, recompute="none", compile="none", kernels=KernelsConfig(), precision=precision
    )
    model = build_model(plain, ranks)
    load(model_state(model), checkpoints.path_of(chosen))
    return model, config, chosen
