"""The processes of a run as two meshes of one rank order, the same code path for one process and for many.

    processes = replicate · shard · context

    dense:    ("replicate", "shard")                   "shard" counts the ranks of one copy, shard · context of them
    experts:  ("replicate", "expert_shard", "expert")  the same ranks of a copy: neighbours split the experts among
                                                       them, and expert_shard ranks each hold a part of that share

Rank = (replica · S + place in the copy), place = expert_shard · expert's size + expert; S = shard · context.
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


class Sizes(NamedTuple):
    """A mesh in numbers.

    replicate: copies of the model. shard: ranks of one copy (shard · context of the config).
    expert: neighbouring ranks that split the experts. expert_shard: ranks that share each part of the split.
    experts_by: what expert_shard cuts: "experts", or "width" of each expert where it has more ranks than experts.
    """

    replicate: int
    shard: int
    expert: int
    expert_shard: int
    experts_by: str


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run.

    rank, world: this process and how many there are; all of them hold different tokens.
    device: where its tensors live.
    sizes: of the meshes. dense, experts: the two views, see the module.
    """

    rank: int
    world: int
    device: torch.device
    sizes: Sizes
    dense: DeviceMesh
    experts: DeviceMesh

    @property
    def data_ranks(self) -> int:
        """How many processes hold different sequences."""
        return self.world

    @property
    def copy_group(self) -> dist.ProcessGroup:
        """The ranks that hold one copy of the model among them, each parameter's parts disjoint."""
        return self.dense.get_group("shard")

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints and writes what is written once."""
        return self.rank == 0


def world_size() -> int:
    """Processes of this run, as the launcher says; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_parallel(parallel: ParallelConfig, model: ModelConfig, world: int) -> Sizes:
    """The mesh that a config means on this many processes.

    Raises:
        UserError: naming what does not come out, and the nearest mesh that does.
    """
    try:
        return mesh_sizes(parallel, model, world)
    except UserError as error:
        raise UserError(f"{error}; use {' '.join(nearest_mesh(parallel, model, world))}") from None


def meshes(model: ModelConfig, world: int) -> Iterator[tuple[int, int, int]]:
    """Every mesh of this many processes on which a model can be laid, as (replicate, shard, expert).

    There is one at least: copies on all of them.
    """
    for shard in divisors(world):
        for expert in divisors(shard):
            try:
                _experts_by(model, expert, shard // expert)
            except UserError:
                continue
            yield world // shard, shard, expert


def nearest_mesh(parallel: ParallelConfig, model: ModelConfig, world: int) -> list[str]:
    """The fewest settings, as dotted words, that make a mesh of a config on this many processes.

    Of several meshes that take as few: the one with most shards, which needs the least memory, then with as many ranks
    that split the experts as were asked for, or the next number below.
    """

    def distance(mesh: tuple[int, int, int]) -> tuple[int, int, bool, int]:
        _, shard, expert = mesh
        return len(mesh_words(parallel, *mesh)), -shard, expert > parallel.expert, abs(expert - parallel.expert)

    return mesh_words(parallel, *min(meshes(model, world), key=distance))


def mesh_words(parallel: ParallelConfig, replicate: int, shard: int, expert: int) -> list[str]:
    """The settings that turn a config's mesh into this one; a -1 that comes out the same is left."""
    asked = {"context": parallel.context, "replicate": parallel.replicate, "shard": parallel.shard}
    wanted = {"context": 1, "replicate": replicate, "shard": shard}
    free = [name for name, value in asked.items() if value == -1]
    changed = {name for name, value in asked.items() if value not in (-1, wanted[name])}
    if len(free) == 2:  # one of them must be given
        changed.add("shard")
    words = [f"parallel.{name}={wanted[name]}" for name in asked if name in changed]
    return words + ([f"parallel.expert={expert}"] if expert != parallel.expert else [])


def mesh_sizes(parallel: ParallelConfig, model: ModelConfig, world: int) -> Sizes:
    """check_parallel, without what to write instead.

    Raises:
        UserError: naming what does not come out.
    """
    for name in ("replicate", "shard", "expert", "context"):
        value = getattr(parallel, name)
        if value < 1 and not (value == -1 and name in ("replicate", "shard")):
            raise UserError(f"parallel.{name}={value} must be at least 1 (or -1, for replicate or shard alone)")
    if parallel.context > 1:
        raise UserError(f"parallel.context={parallel.context} is not built yet (parallel.shard takes its ranks)")
    replicate, shard = _fill_in(parallel, world)
    if shard % parallel.expert:
        raise UserError(f"parallel.expert={parallel.expert} does not divide shard × context = {shard}")
    outer = shard // parallel.expert
    return Sizes(replicate, shard, parallel.expert, outer, _experts_by(model, parallel.expert, outer))


def _fill_in(parallel: ParallelConfig, world: int) -> tuple[int, int]:
    """replicate and shard, a -1 replaced by what is left."""
    replicate, shard = parallel.replicate, parallel.shard
    if replicate == -1 and shard == -1:
        raise UserError("parallel.replicate and parallel.shard are both -1 and only one can be what is left")
    known = parallel.context * (replicate if replicate != -1 else 1) * (shard if shard != -1 else 1)
    if -1 in (replicate, shard) and world % known == 0:
        return (world // known, shard) if replicate == -1 else (replicate, world // known)
    if known != world:
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
    """Of a number of at least 1, smallest first."""
    small = [size for size in range(1, math.isqrt(n) + 1) if n % size == 0]
    return sorted({*small, *(n // size for size in small)})


def start(parallel: ParallelConfig, model: ModelConfig, threads: int | None, deterministic: bool) -> Ranks:
    """Join the process group, choose the device, and fix what decides the order of sums.

    torchrun gives each process one OpenMP thread and plain python gives it all cores; sums over threads change bits, so
    the number is set here, from the config or the machine alone.
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
    sizes = check_parallel(parallel, model, world_size())
    _join(on_gpu)
    return join_meshes(sizes, device)


def join_meshes(sizes: Sizes, device: torch.device) -> Ranks:
    """The two views of a process group that exists; every rank of it calls this."""
    copies = sizes.replicate
    dense = init_device_mesh(device.type, (copies, sizes.shard), mesh_dim_names=("replicate", "shard"))
    experts = init_device_mesh(
        device.type, (copies, sizes.expert_shard, sizes.expert), mesh_dim_names=("replicate", "expert_shard", "expert")
    )
    return Ranks(dist.get_rank(), dist.get_world_size(), device, sizes, dense, experts)


def _join(on_gpu: bool) -> None:
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if "MASTER_ADDR" in os.environ:
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun on one node keeps its store over restarts, and torch 2.13 looks in it for the others where they
            # were before. Several nodes meet anew each time, and count their restarts each for itself.
            store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        return
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
