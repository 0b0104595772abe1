"""Device meshes: all processes of a run as meshes over one rank order. One process is a mesh of size 1.

    processes = replicate · shard · context

    dense:    ("replicate", "shard")                   "shard" has the ranks of one replica: S = shard · context
    experts:  ("replicate", "expert_shard", "expert")  the same ranks: neighbours ("expert") split the experts, and the
                                                       ranks of "expert_shard" shard each share
    rows:     ("data", "context")                      the same ranks: neighbours ("context") divide the same rows

Rank = replica · S + r, where r is the coordinate in "shard"; r = (coordinate in "expert_shard") · expert + (coordinate
in "expert"). Rank = (coordinate in "data") · context + (coordinate in "context"), the innermost in the order of ranks.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trinity.config.model import ModelConfig
from trinity.config.run import ParallelConfig
from trinity.errors import UserError
from trinity.hardware import keep_freed_memory
from trinity.parallel.context_parallel import ContextParallel


class Sizes(NamedTuple):
    """Sizes of the mesh dimensions.

    replicate: replicas of the model. shard: ranks of one replica (shard · context of the config).
    expert: neighbouring ranks that split the experts. expert_shard: ranks that shard each share of the experts.
    experts_by: what expert_shard shards: "experts", or the "width" of each expert where it has more ranks than experts.
    context: neighbouring ranks that divide the tokens of the same rows; a divisor of shard.
    """

    replicate: int
    shard: int
    expert: int
    expert_shard: int
    experts_by: str
    context: int = 1


@dataclass(frozen=True)
class Ranks:
    """This process's rank, device and meshes.

    rank, world: this process's number and the number of processes; each has different tokens.
    device: of this process's tensors.
    sizes: sizes of the mesh dimensions. dense, experts: the meshes of the module's docstring.
    context: this rank's group of the mesh of rows; None where each rank has whole rows.
    """

    rank: int
    world: int
    device: torch.device
    sizes: Sizes
    dense: DeviceMesh
    experts: DeviceMesh
    context: ContextParallel | None = None

    @property
    def data_rank(self) -> int:
        """Number of the group of ranks that this rank has rows in common with, among `data_ranks` groups."""
        return self.rank // self.sizes.context

    @property
    def data_ranks(self) -> int:
        """Number of groups of ranks with different sequences."""
        return self.world // self.sizes.context

    def columns(self, length: int) -> slice:
        """The columns that this rank computes of its rows of `length` tokens: all without context parallelism."""
        return slice(0, length) if self.context is None else self.context.columns(length)

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """The ranks of this rank's replica, which together hold the model in disjoint shards."""
        return self.dense.get_group("shard")

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which prints and writes what is written once."""
        return self.rank == 0


def world_size() -> int:
    """Number of processes, from the launcher's WORLD_SIZE; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_parallel(parallel: ParallelConfig, model: ModelConfig, world: int) -> Sizes:
    """The mesh of a config on `world` processes.

    Raises:
        UserError: the config fits no mesh; the message names the wrong value and the nearest valid mesh.
    """
    try:
        return mesh_sizes(parallel, model, world)
    except UserError as error:
        raise UserError(f"{error}; use {' '.join(nearest_mesh(parallel, model, world))}") from None


def meshes(model: ModelConfig, world: int, context: int = 1) -> Iterator[tuple[int, int, int]]:
    """Every valid mesh of `world` processes for a model, as (replicate, shard, expert), where shard counts all ranks of
    a replica and is a multiple of `context`.

    There is always one if that is 1: a replica on each process.
    """
    for shard in divisors(world):
        if shard % context:
            continue
        for expert in divisors(shard):
            try:
                _experts_by(model, expert, shard // expert)
            except UserError:
                continue
            yield world // shard, shard, expert


def nearest_mesh(parallel: ParallelConfig, model: ModelConfig, world: int, context: int | None = None) -> list[str]:
    """The fewest settings, as dotted words, that make a config valid on `world` processes, with `context` if given.

    Of meshes with equally few settings: the one with the most shards, which needs the least memory; then the one whose
    `expert` is as configured, or else the next smaller one.
    """

    def distance(mesh: tuple[int, int, int]) -> tuple[int, int, bool, int]:
        _, shard, expert = mesh
        words = mesh_words(parallel, *mesh, context)
        return len(words), -shard, expert > parallel.expert, abs(expert - parallel.expert)

    return mesh_words(parallel, *min(meshes(model, world, context or 1), key=distance), context)


def mesh_words(
    parallel: ParallelConfig, replicate: int, shard: int, expert: int, context: int | None = None
) -> list[str]:
    """The settings that change a config's mesh to this one; a -1 with the right result is not changed.

    Args:
        shard: all ranks of a replica: shard · context of the config.
        context: by default the config's if it divides shard, else 1.
    """
    if context is None:
        context = parallel.context if parallel.context > 0 and shard % parallel.context == 0 else 1
    configured = {"context": parallel.context, "replicate": parallel.replicate, "shard": parallel.shard}
    target = {"context": context, "replicate": replicate, "shard": shard // context}
    free = [name for name, value in configured.items() if value == -1 and name != "context"]
    changed = {name for name, value in configured.items() if name not in free and value != target[name]}
    if len(free) == 2:  # only one may be -1
        changed.add("shard")
    words = [f"parallel.{name}={target[name]}" for name in configured if name in changed]
    return words + ([f"parallel.expert={expert}"] if expert != parallel.expert else [])


def mesh_sizes(parallel: ParallelConfig, model: ModelConfig, world: int) -> Sizes:
    """As check_parallel, but the error message does not name a valid mesh.

    Raises:
        UserError: the config fits no mesh; the message names the wrong value.
    """
    for name in ("replicate", "shard", "expert", "context"):
        value = getattr(parallel, name)
        if value < 1 and not (value == -1 and name in ("replicate", "shard")):
            raise UserError(f"parallel.{name}={value} must be at least 1 (or -1, for replicate or shard alone)")
    replicate, shard = _replicate_and_shard(parallel, world)
    shard *= parallel.context
    if shard % parallel.expert:
        raise UserError(f"parallel.expert={parallel.expert} does not divide shard × context = {shard}")
    outer = shard // parallel.expert
    experts_by = _experts_by(model, parallel.expert, outer)
    return Sizes(replicate, shard, parallel.expert, outer, experts_by, parallel.context)


def _replicate_and_shard(parallel: ParallelConfig, world: int) -> tuple[int, int]:
    """replicate and shard, with -1 replaced by the remaining factor of `world`."""
    replicate, shard = parallel.replicate, parallel.shard
    if replicate == -1 and shard == -1:
        raise UserError("parallel.replicate and parallel.shard are both -1 and only one can be what is left")
    fixed = parallel.context * (replicate if replicate != -1 else 1) * (shard if shard != -1 else 1)
    if -1 in (replicate, shard) and world % fixed == 0:
        return (world // fixed, shard) if replicate == -1 else (replicate, world // fixed)
    if fixed != world:
        raise UserError(
            f"parallel.replicate={parallel.replicate} × shard={parallel.shard} × context={parallel.context} "
            f"does not make {world} process{'es' * (world > 1)}"
        )
    return replicate, shard


def _experts_by(model: ModelConfig, expert: int, outer: int) -> str:
    if model.dense_layers >= model.layers:
        return "experts"
    if model.experts % expert:
        raise UserError(f"parallel.expert={expert} does not divide model.experts={model.experts}")
    share = model.experts // expert
    if share % outer == 0:
        return "experts"
    if model.expert_width % outer == 0:
        return "width"
    raise UserError(
        f"{outer} ranks (parallel.shard × context / expert) can divide neither the {share} experts of a share nor "
        f"model.expert_width={model.expert_width}"
    )


def divisors(n: int) -> list[int]:
    """Divisors of n ≥ 1, smallest first."""
    small = [size for size in range(1, math.isqrt(n) + 1) if n % size == 0]
    return sorted({*small, *(n // size for size in small)})


def start(parallel: ParallelConfig, model: ModelConfig, threads: int | None, deterministic: bool) -> Ranks:
    """Join the process group, select the device, and set threads and deterministic algorithms.

    torchrun gives each process one OpenMP thread, plain python all cores. The number of threads changes the order of
    sums and so the bits of results; it is set here, from the config or the machine only.
    """
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_world))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    sizes = check_parallel(parallel, model, world_size())
    _init_process_group(on_gpu)
    return join_meshes(sizes, device)


def join_meshes(sizes: Sizes, device: torch.device) -> Ranks:
    """The meshes over an existing process group; every rank of it calls this."""
    replicas = sizes.replicate
    dense = init_device_mesh(device.type, (replicas, sizes.shard), mesh_dim_names=("replicate", "shard"))
    expert_names = ("replicate", "expert_shard", "expert")
    experts = init_device_mesh(device.type, (replicas, sizes.expert_shard, sizes.expert), mesh_dim_names=expert_names)
    context = None
    if sizes.context > 1:
        rows = (dist.get_world_size() // sizes.context, sizes.context)
        names = ("data", "context")
        context = ContextParallel(init_device_mesh(device.type, rows, mesh_dim_names=names).get_group("context"))
    return Ranks(dist.get_rank(), dist.get_world_size(), device, sizes, dense, experts, context)


def _init_process_group(on_gpu: bool) -> None:
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if "MASTER_ADDR" in os.environ:
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # A prefix for each restart: on one node torchrun keeps its store over restarts, and torch 2.13 would find
            # the addresses of the previous processes in it. Several nodes have a new store at each restart, and each
            # node counts its restarts separately.
            store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        return
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def stop() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
