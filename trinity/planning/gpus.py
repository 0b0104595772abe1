"""The numbers of GPUs on which a config runs: its fixed sizes, and all that is dealt over them evenly."""

import math

from trinity.config.run import RunConfig
from trinity.errors import UserError
from trinity.parallel.mesh import Sizes, check_parallel
from trinity.training.setup import check_batches


def gpus_needed(config: RunConfig) -> int:
    """The fewest that the mesh's fixed sizes make; a −1 counts as 1."""
    parallel = config.parallel
    return math.prod(max(1, size) for size in (parallel.replicate, parallel.shard, parallel.context))


def check_gpus(config: RunConfig, gpus: int) -> Sizes:
    """The mesh on so many GPUs.

    Raises:
        UserError: the mesh, a global batch or the streams do not divide; names numbers that do.
    """
    if gpus < 1:
        raise UserError(f"--gpus {gpus} must be at least 1")
    try:
        return _divided(config, gpus)
    except UserError as error:
        runs = ", ".join(map(str, gpus_that_run(config))) or "no number of GPUs as it stands"
        raise UserError(f"{error} (this config runs on: {runs})") from None


def gpus_that_run(config: RunConfig) -> list[int]:
    """Every number of GPUs that the mesh's sizes, all global batches and the streams divide by, smallest first."""
    batches = [config.batch.sequences, *(entry.sequences for entry in config.batch.ramp)]
    most = math.gcd(config.data.streams, *batches)
    return [gpus for gpus in range(1, most + 1) if most % gpus == 0 and _runs(config, gpus)]


def _runs(config: RunConfig, gpus: int) -> bool:
    try:
        _divided(config, gpus)
    except UserError:
        return False
    return True


def _divided(config: RunConfig, gpus: int) -> Sizes:
    sizes = check_parallel(config.parallel, config.model, gpus)
    check_batches(config, gpus)
    if config.data.streams % gpus:
        raise UserError(f"data.streams={config.data.streams} does not divide by {gpus} data ranks")
    return sizes
