"""The mesh of a plan: check the config's mesh on N GPUs, or list candidate meshes where it does not fit N."""

import math
from dataclasses import replace
from typing import Any

from trinity.config.run import RunConfig
from trinity.errors import UserError
from trinity.hardware import GPU
from trinity.models.flops import parameter_counts
from trinity.parallel.mesh import Sizes, mesh_words, meshes
from trinity.training.build import trained_count
from trinity.training.divisibility import (
    batch_process_counts,
    check_batches,
    check_mesh,
    divisible_settings,
    first_indivisible,
)


def min_gpus(config: RunConfig) -> int:
    """The product of the mesh's fixed sizes, with −1 counted as 1: the fewest GPUs that the config runs on."""
    parallel = config.parallel
    return math.prod(max(1, size) for size in (parallel.replicate, parallel.shard, parallel.context))


def check_gpus(config: RunConfig, gpus: int) -> Sizes:
    """The config's mesh on `gpus` GPUs.

    Raises:
        UserError: the mesh, a global batch or the streams do not divide; the message names values that do.
    """
    check_gpu_count(gpus)
    sizes = check_mesh(config, gpus)
    check_batches(config, gpus // sizes.context)
    return sizes


def check_batches_for_any_mesh(config: RunConfig, gpus: int) -> None:
    """Check that global batches and streams divide by `gpus`, for any mesh.

    Raises:
        UserError: they do not. The message names the nearest GPU counts below and above that do, then the settings
            that would make `gpus` work.
    """
    data_ranks = gpus // config.parallel.context if gpus % config.parallel.context == 0 else gpus
    undivided = first_indivisible(config, data_ranks)
    if undivided:
        counts = batch_process_counts(config)
        below = [count for count in counts if count < gpus][-1:]
        nearest = [*below, *[count for count in counts if count > gpus][:1]]
        words = " ".join(divisible_settings(config, data_ranks))
        raise UserError(f"{undivided}; use --gpus {' or '.join(map(str, nearest))}, or with {gpus} GPUs {words}")


def check_gpu_count(gpus: int) -> None:
    """Check that `gpus` is at least 1.

    Raises:
        UserError: it is less.
    """
    if gpus < 1:
        raise UserError(f"--gpus {gpus} must be at least 1")


def mesh_candidates(config: RunConfig, gpus: int, card: GPU) -> dict[int, list[tuple[list[str], RunConfig]]]:
    """Meshes to estimate, by number of shards in ascending order: pairs of settings and the config with them.

    For each number of shards the experts are not split, split as the config sets, and split over as many GPUs of one
    node as divide. Context parallelism stays as it is if it divides the GPUs.
    """
    experts_by_shard: dict[int, list[int]] = {}
    context = config.parallel.context if gpus % config.parallel.context == 0 else 1
    for _, shard, expert in meshes(config.model, gpus, context):
        experts_by_shard.setdefault(shard, []).append(expert)
    candidates = {}
    for shard, experts in experts_by_shard.items():
        in_node = max((expert for expert in experts if expert <= card.per_node), default=1)
        chosen = sorted({1, config.parallel.expert, in_node} & {*experts})
        settings = [mesh_words(config.parallel, gpus // shard, shard, expert) for expert in chosen or experts[:1]]
        candidates[shard] = [(words, with_mesh(config, words)) for words in settings]
    return candidates


def with_mesh(config: RunConfig, words: list[str]) -> RunConfig:
    """The config with `parallel.NAME=SIZE` settings, as mesh_words returns them."""
    values = dict(word.removeprefix("parallel.").split("=") for word in words)
    sizes: dict[str, Any] = {name: int(value) for name, value in values.items()}  # mesh_words names sizes alone
    return replace(config, parallel=replace(config.parallel, **sizes))


def min_state_bytes(config: RunConfig) -> float:
    """A lower bound on the bytes of parameters and momentum, summed over all shards; the frozen have no momentum."""
    size = 8 if config.precision.compute == "float64" else 4
    total = parameter_counts(config.model)["total"]
    return size * (total + (trained_count(config) if config.train.only else total))
