"""Measure every rank and every link before a long run, on all ranks at the same time, as training would load them.

`preflight_report.py` defines the measurements and finds outliers among them.
"""

import importlib.metadata
import os
import platform
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from trinity.parallel.preflight_report import Report

COLLECTIVE_TIMEOUT = timedelta(minutes=5)
"""Time after which a collective that hangs fails."""


class Workload(NamedTuple):
    """Sizes of the measurements.

    gemm: side of the matrices. copy_mib, reduce_mib: size of the tensor, MiB. seconds: approximate time for each.
    """

    gemm: int
    copy_mib: int
    reduce_mib: int
    seconds: float


def default_workload(on_gpu: bool, quick: bool) -> Workload:
    """Sizes that fill a GPU, or that take a CPU a second; quick: only to see that every rank answers."""
    if on_gpu:
        return Workload(4096, 256, 128, 0.2) if quick else Workload(8192, 1024, 1024, 3.0)
    return Workload(256, 8, 1, 0.05) if quick else Workload(1024, 128, 16, 1.0)


def init_process_group() -> torch.device:
    """Join the process group of the launcher, or make one of this process alone; return this rank's device."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")


def measure(workload: Workload, device: torch.device) -> list[Report]:
    """Measure this rank and its links; every rank calls this and gets the reports of all, in order of rank."""
    infos = _gather(_rank_info() | _versions(device))
    figures: Report = {"gemm": _gemm(workload, device), "copy": _copy(workload, device)}
    figures |= _all_reduces(workload, device, [info["node"] for info in infos])
    return _gather(infos[dist.get_rank()] | figures)


def neighbour_pairs(nodes: int) -> list[list[tuple[int, ...]]]:
    """The pairs of neighbours on a ring of nodes, in rounds in which no node appears twice."""
    if nodes < 3:
        return [[(0, 1)]] if nodes == 2 else []
    rounds: list[list[tuple[int, ...]]] = [[], [], []]
    for node in range(nodes):
        last_of_odd_ring = nodes % 2 and node == nodes - 1
        rounds[2 if last_of_odd_ring else node % 2].append((node, (node + 1) % nodes))
    return [pairs for pairs in rounds if pairs]


def _rank_info() -> Report:
    environment = os.environ
    return {
        "rank": dist.get_rank(),
        "node": int(environment.get("GROUP_RANK", "0")),
        "local_rank": int(environment.get("LOCAL_RANK", "0")),
        "host": socket.gethostname(),
    }


def _versions(device: torch.device) -> Report:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    on_gpu = device.type == "cuda"
    driver = Path("/proc/driver/nvidia/version")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "driver": driver.read_text().splitlines()[0] if driver.is_file() else None,
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
    }


def _gather(report: Report) -> list[Report]:
    reports: list[Report] = [{}] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    return reports


def _gemm(workload: Workload, device: torch.device) -> float:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    n = workload.gemm
    # random, because a GPU draws less power, and so runs faster, on zeros
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _mean_seconds(lambda: torch.mm(a, b, out=out), workload, device) / 1e12


def _copy(workload: Workload, device: torch.device) -> float:
    source = torch.ones(workload.copy_mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _mean_seconds(lambda: target.copy_(source), workload, device) / 1e9


def _all_reduces(workload: Workload, device: torch.device, node_of: list[int]) -> Report:
    """Bus bandwidths within node, pair and all ranks, and algorithm bandwidth of all; None for a group of one rank."""
    nodes = max(node_of) + 1
    tensor = torch.zeros(workload.reduce_mib * 2**18, device=device)  # fp32

    def algorithm_bandwidth(group: dist.ProcessGroup | None) -> float:
        seconds = _mean_seconds(lambda: dist.all_reduce(tensor, group=group), workload, device, group)
        return tensor.nbytes / seconds / 1e9

    def bus_bandwidth(sets_of_nodes: list[tuple[int, ...]]) -> float | None:
        """Over the ranks of the set of nodes that contains this rank; all sets measure at the same time."""
        sets = [[rank for rank, node in enumerate(node_of) if node in members] for members in sets_of_nodes]
        group, _ = dist.new_subgroups_by_enumeration(sets, timeout=COLLECTIVE_TIMEOUT)
        own_set = next((ranks for ranks in sets if dist.get_rank() in ranks), [])
        return algorithm_bandwidth(group) * _bus_factor(len(own_set)) if len(own_set) > 1 else None

    node = bus_bandwidth([(node,) for node in range(nodes)])
    pairs = [bus_bandwidth(pairs) for pairs in neighbour_pairs(nodes)]
    algorithm = algorithm_bandwidth(None) if len(node_of) > 1 else None
    return {
        "node_bus": node,
        "pair_bus": max((pair for pair in pairs if pair is not None), default=None),
        "all_bus": algorithm and algorithm * _bus_factor(len(node_of)),
        "all_algorithm": algorithm,
    }


def _bus_factor(ranks: int) -> float:
    return 2 * (ranks - 1) / ranks


def _mean_seconds(
    call: Callable[[], Any], workload: Workload, device: torch.device, group: dist.ProcessGroup | None = None
) -> float:
    """Mean time of a call over about workload.seconds; the group's ranks start together and repeat equally often."""

    def timed(repeats: int) -> float:
        _max_over_ranks(0.0, group)  # a barrier
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / repeats

    timed(1)  # warm-up: first use of memory and connections is slower
    return timed(max(1, int(workload.seconds / _max_over_ranks(timed(1), group))))


def _max_over_ranks(seconds: float, group: dist.ProcessGroup | None) -> float:
    times = torch.tensor(seconds, dtype=torch.float64)  # on the CPU, over gloo: does not wait for kernels
    dist.all_reduce(times, dist.ReduceOp.MAX, group=group)
    return times.item()
