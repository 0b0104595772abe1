"""What the machine under a run can do and has used."""

import os
import platform
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch


class GPU(NamedTuple):
    """One GPU in a node of eight, by its vendor's data sheets; rates are per GPU, links in one direction.

    bf16, fp32: FLOP/s, dense (data sheets print twice as much, "with sparsity", for bf16).
    memory: bytes. bandwidth: of that memory, bytes/s.
    nvlink: bytes/s to the other GPUs of the node. network: bytes/s to other nodes.
    """

    bf16: float
    fp32: float
    memory: float
    bandwidth: float
    nvlink: float
    network: float


# NVIDIA's data sheets of the GPUs, and of the DGX systems for network cards (one a GPU: ConnectX-6 200, ConnectX-7 400,
# ConnectX-8 800 Gbit/s) and for memory per GPU.
GPUS = {
    "a100": GPU(312e12, 19.5e12, 80e9, 2.04e12, 300e9, 25e9),
    "h100": GPU(989e12, 67e12, 80e9, 3.35e12, 450e9, 50e9),
    "h200": GPU(989e12, 67e12, 141e9, 4.8e12, 450e9, 50e9),
    "b200": GPU(2250e12, 75e12, 180e9, 8e12, 900e9, 50e9),
    "b300": GPU(2250e12, 75e12, 288e9, 8e12, 900e9, 100e9),
}
GPUS_PER_NODE = 8


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a known GPU; None where it is not known, and on a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu.bf16 for key, gpu in GPUS.items() if key.upper() in name), None)


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the machine's CPU with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [platform.processor(), platform.machine()]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(": ")[2] for line in lines if line.startswith("model name")] + names
    return f"{next(filter(None, names), 'CPU')}, {os.cpu_count()} cores"


def memory_gib(device: torch.device) -> float:
    """The most memory held so far, in GiB: by the allocator on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
