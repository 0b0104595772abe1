"""The processes of a run as a mesh: one code path for one process and for many.

Dense parameters are sharded over `shard` · `context` and replicated over `replicate`.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trinity.config.run import Parallel
from trinity.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run.

    rank, world: this process and how many there are; data_ranks of them hold different tokens.
    device: where its tensors live.
    mesh: dimensions "replicate" and "shard".
    """

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def data_ranks(self) -> int:
        """How many processes hold different tokens."""
        return self.world

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints and writes what is written once."""
        return self.rank == 0


def world_size() -> int:
    """Processes of this run, as the launcher says; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_parallel(parallel: Parallel, world: int) -> tuple[int, int]:
    """Mesh sizes (replicate, shard) for this many processes.

    Raises:
        UserError: naming the product that does not come out.
    """
    for name in ("replicate", "shard", "expert", "context"):
        value = getattr(parallel, name)
        if value < 1 and not (value == -1 and name in ("replicate", "shard")):
            raise UserError(f"parallel.{name}={value} must be at least 1 (or -1, for replicate or shard alone)")
    replicate, shard = parallel.replicate, parallel.shard
    if replicate == -1 and shard == -1:
        raise UserError("parallel.replicate and parallel.shard are both -1; give one of them")
    known = parallel.context * (replicate if replicate != -1 else 1) * (shard if shard != -1 else 1)
    if -1 in (replicate, shard) and world % known == 0:
        replicate = world // known if replicate == -1 else replicate
        shard = world // known if shard == -1 else shard
    elif known != world:
        raise UserError(
            f"parallel.replicate={parallel.replicate} × shard={parallel.shard} × context={parallel.context} "
            f"does not make {world} process{'es' * (world > 1)}; start {known} (or a multiple, with a -1) "
            "or change the sizes, for example parallel.shard=-1"
        )
    if shard * parallel.context % parallel.expert:
        raise UserError(
            f"parallel.expert={parallel.expert} does not divide shard × context = {shard * parallel.context}"
        )
    if world > 1:
        raise UserError(f"{world} processes were started and this version runs on one; start one process")
    return replicate, shard


def start(parallel: Parallel, threads: int | None, deterministic: bool) -> Ranks:
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
    replicate, shard = check_parallel(parallel, world_size())
    _join(on_gpu)
    mesh = init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))
    return Ranks(dist.get_rank(), dist.get_world_size(), device, mesh)


def _join(on_gpu: bool) -> None:
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend)
        return
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
