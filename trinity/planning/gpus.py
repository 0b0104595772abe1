"""The mesh of a plan: that of the config, or where it cannot be laid over the GPUs, the fastest found that fits."""

import math
from dataclasses import replace

from trinity.config.run import RunConfig
from trinity.errors import UserError
from trinity.hardware import GPU
from trinity.models.flops import parameter_counts
from trinity.parallel.mesh import Sizes, mesh_words, meshes
from trinity.training.divisibility import (
    batch_process_counts,
    check_batches,
    check_mesh,
    divisible_settings,
    first_indivisible,
)


def gpus_needed(config: RunConfig) -> int:
    """The fewest that the mesh's fixed sizes make; a −1 counts as 1."""
    parallel = config.parallel
    return math.prod(max(1, size) for size in (parallel.replicate, parallel.shard, parallel.context))


def check_gpus(config: RunConfig, gpus: int) -> Sizes:
    """The mesh on a number of GPUs.

    Raises:
        UserError: the mesh, a global batch or the streams do not divide; says what does.
    """
    check_count(gpus)
    sizes = check_mesh(config, gpus)
    check_batches(config, gpus)
    return sizes


def check_batches_for_any_mesh(config: RunConfig, gpus: int) -> None:
    """Refuse global batches and streams that do not divide by the GPUs, where their mesh may be picked.

    Raises:
        UserError: naming the nearest numbers of GPUs below and above that need no mending; then settings for this one.
    """
    undivided = first_indivisible(config, gpus)
    if undivided:
        counts = batch_process_counts(config)
        below = [count for count in counts if count < gpus][-1:]
        nearest = [*below, *[count for count in counts if count > gpus][:1]]
        words = " ".join(divisible_settings(config, gpus))
        raise UserError(f"{undivided}; use --gpus {' or '.join(map(str, nearest))}, or with {gpus} GPUs {words}")


def check_count(gpus: int) -> None:
    """Refuse fewer than one.

    Raises:
        UserError: for less.
    """
    if gpus < 1:
        raise UserError(f"--gpus {gpus} must be at least 1")


def mesh_candidates(config: RunConfig, gpus: int, card: GPU) -> dict[int, list[tuple[list[str], RunConfig]]]:
    """Meshes worth an estimate by number of shards, smallest first: settings, with the changed config.

    Experts are split as the config asks, not at all, and among as many GPUs of a node as can be.
    """
    experts_by_shard: dict[int, list[int]] = {}
    for _, shard, expert in meshes(config.model, gpus):
        experts_by_shard.setdefault(shard, []).append(expert)
    found = {}
    for shard, experts in experts_by_shard.items():
        within = max((expert for expert in experts if expert <= card.per_node), default=1)
        chosen = sorted({1, config.parallel.expert, within} & {*experts})
        tried = [mesh_words(config.parallel, gpus // shard, shard, expert) for expert in chosen or experts[:1]]
        found[shard] = [(words, with_mesh(config, words)) for words in tried]
    return found


def with_mesh(config: RunConfig, words: list[str]) -> RunConfig:
    """The config with settings of parallel, as mesh_words gives them."""
    values = dict(word.removeprefix("parallel.").split("=") for word in words)
    return replace(config, parallel=replace(config.parallel, **{name: int(value) for name, value in values.items()}))


def least_state(config: RunConfig) -> float:
    """Bytes that parameters and momentum take at least, over all shards."""
    size = 8 if config.precision.compute == "float64" else 4
    return 2 * size * parameter_counts(config.model)["total"]
