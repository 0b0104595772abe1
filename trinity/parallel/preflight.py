"""Measures every rank and every link before a long run, on all ranks at the same time, as a run would load them.

What the figures are, and which rank stands out by them, is in `preflight_report.py`.
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

PATIENCE = timedelta(minutes=5)
"""How long a collective may hang before the ranks give up."""


class Effort(NamedTuple):
    """gemm: side of the matrices. copy_mib, reduce_mib: bytes, in MiB. seconds: of each measurement, about."""

    gemm: int
    copy_mib: int
    reduce_mib: int
    seconds: float


def usual_effort(on_gpu: bool, quick: bool) -> Effort:
    """Sizes that fill a GPU, or that a CPU does in a moment; quick: to see that everything answers."""
    if on_gpu:
        return Effort(4096, 256, 128, 0.2) if quick else Effort(8192, 1024, 1024, 3.0)
    return Effort(256, 8, 1, 0.05) if quick else Effort(1024, 128, 16, 1.0)


def join() -> torch.device:
    """Enter the process group that the launcher describes, or one of this process alone; this rank's device."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=PATIENCE)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")


def examine(effort: Effort, device: torch.device) -> list[Report]:
    """Measure; every rank calls this, and gets the reports of all in order of rank."""
    places = _gathered(_place() | _facts(device))
    figures = {"gemm": _gemm(effort, device), "copy": _copy(effort, device)}
    figures |= _all_reduces(effort, device, [place["node"] for place in places])
    return _gathered(places[dist.get_rank()] | figures)


def neighbours(nodes: int) -> list[list[tuple[int, int]]]:
    """The pairs of neighbours on a ring of nodes, in rounds in which no node stands twice."""
    if nodes < 3:
        return [[(0, 1)]] if nodes == 2 else []
    rounds: list[list[tuple[int, int]]] = [[], [], []]
    for node in range(nodes):
        last_of_odd_ring = nodes % 2 and node == nodes - 1
        rounds[2 if last_of_odd_ring else node % 2].append((node, (node + 1) % nodes))
    return [pairs for pairs in rounds if pairs]


def _place() -> Report:
    environment = os.environ
    return {
        "rank": dist.get_rank(),
        "node": int(environment.get("GROUP_RANK", "0")),
        "local_rank": int(environment.get("LOCAL_RANK", "0")),
        "host": socket.gethostname(),
    }


def _facts(device: torch.device) -> Report:
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


def _gathered(report: Report) -> list[Report]:
    reports: list[Report] = [{}] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    return reports


def _gemm(effort: Effort, device: torch.device) -> float:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    n = effort.gemm
    # random, because a GPU draws less power, and so runs faster, on zeros
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _seconds(lambda: torch.mm(a, b, out=out), effort, device) / 1e12


def _copy(effort: Effort, device: torch.device) -> float:
    source = torch.ones(effort.copy_mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source), effort, device) / 1e9


def _all_reduces(effort: Effort, device: torch.device, node_of: list[int]) -> Report:
    """Bus bandwidths among node, pair and all, and the algorithm bandwidth among all; None for a group of one rank."""
    nodes = max(node_of) + 1
    tensor = torch.zeros(effort.reduce_mib * 2**18, device=device)  # fp32

    def algorithm_bandwidth(group: dist.ProcessGroup | None) -> float:
        seconds = _seconds(lambda: dist.all_reduce(tensor, group=group), effort, device, group)
        return tensor.nbytes / seconds / 1e9

    def bus_bandwidth(sets_of_nodes: list[tuple[int, ...]]) -> float | None:
        """Among the ranks of that set of nodes in which this one is; all sets at the same time."""
        sets = [[rank for rank, node in enumerate(node_of) if node in members] for members in sets_of_nodes]
        group, _ = dist.new_subgroups_by_enumeration(sets, timeout=PATIENCE)
        mine = next((ranks for ranks in sets if dist.get_rank() in ranks), [])
        return algorithm_bandwidth(group) * _bus_factor(len(mine)) if len(mine) > 1 else None

    node = bus_bandwidth([(node,) for node in range(nodes)])
    pairs = [bus_bandwidth(pairs) for pairs in neighbours(nodes)]
    among_all = algorithm_bandwidth(None) if len(node_of) > 1 else None
    return {
        "node_bus": node,
        "pair_bus": max((pair for pair in pairs if pair is not None), default=None),
        "all_bus": among_all and among_all * _bus_factor(len(node_of)),
        "all_algorithm": among_all,
    }


def _bus_factor(ranks: int) -> float:
    return 2 * (ranks - 1) / ranks


def _seconds(
    call: Callable[[], Any], effort: Effort, device: torch.device, group: dist.ProcessGroup | None = None
) -> float:
    """Mean time of a call, repeated for about effort.seconds; the group's ranks begin together and repeat as often."""

    def timed(repeats: int) -> float:
        _slowest(0.0, group)  # a barrier
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / repeats

    timed(1)  # the first is slower: memory is touched, connections are made
    return timed(max(1, int(effort.seconds / _slowest(timed(1), group))))


def _slowest(seconds: float, group: dist.ProcessGroup | None) -> float:
    times = torch.tensor(seconds, dtype=torch.float64)  # on the CPU: over gloo, so that it waits for no kernel
    dist.all_reduce(times, dist.ReduceOp.MAX, group=group)
    return times.item()
