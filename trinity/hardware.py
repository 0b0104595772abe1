"""Peak FLOP/s, memory and links of GPUs: one table for plans and MFU, a GPU described by --gpu, and this machine.

Memory is in bytes. A data sheet's GB is taken as 10⁹ bytes; drivers report up to 7 % more.
"""

import ctypes
import math
import os
import platform
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from trinity.errors import UserError


class GPU(NamedTuple):
    """One GPU, or one process's share of a CPU. Rates are per GPU, links in one direction.

    bf16, fp32: dense FLOP/s (data sheets print twice the bf16 rate, "with sparsity").
    memory: bytes. bandwidth: memory bandwidth, bytes/s.
    node_link: bytes/s to the other GPUs of the node, by NVLink or else PCIe.
    network: bytes/s to other nodes. per_node: number of GPUs that node_link connects.
    name: for messages. origin: source of these values.
    """

    bf16: float
    fp32: float
    memory: float
    bandwidth: float
    node_link: float
    network: float
    per_node: int = 8
    name: str = "GPU"
    origin: str = "by its data sheet"


PCIE4, PCIE5 = 31.5e9, 63e9
"""Bytes/s of 16 PCIe lanes in one direction."""

# bf16 is the dense tensor-core rate with fp32 accumulation.
# Data-centre GPUs: NVIDIA's data sheets (A100, H100, H200, GH200, B200/B300 of DGX, GB200/GB300 NVL72, L40S, L40, L4,
#   A40, A10); network cards of the DGX systems: one per GPU, ConnectX-6 200, ConnectX-7 400, ConnectX-8 800 Gbit/s.
# RTX 3090, 3090 Ti: whitepapers "NVIDIA Ampere GA102" and "NVIDIA Ada". RTX 4080, 4090: "NVIDIA Ada".
# RTX 5080, 5090, PRO 6000: "NVIDIA RTX Blackwell". RTX A6000, RTX 6000 Ada: their data sheets.
# Not from a data sheet: the network of cards without NVLink, 100 Gbit/s per GPU in servers and 10 in other machines.
_SERVER, _DESKTOP = 12.5e9, 1.25e9
_TABLE = {
    "a100": GPU(312e12, 19.5e12, 80e9, 2.04e12, 300e9, 25e9),
    "a100-80gb": GPU(312e12, 19.5e12, 80e9, 2.04e12, 300e9, 25e9),
    "a100-40gb": GPU(312e12, 19.5e12, 40e9, 1.555e12, 300e9, 25e9),
    "h100": GPU(989e12, 67e12, 80e9, 3.35e12, 450e9, 50e9),
    "h100-nvl": GPU(835e12, 60e12, 94e9, 3.9e12, PCIE5, _SERVER),
    "h100-pcie": GPU(756e12, 51e12, 80e9, 2.0e12, PCIE5, _SERVER),
    "h200": GPU(989e12, 67e12, 141e9, 4.8e12, 450e9, 50e9),
    "gh200": GPU(989e12, 67e12, 96e9, 4.0e12, 450e9, 50e9, per_node=1),
    "b200": GPU(2250e12, 75e12, 180e9, 8e12, 900e9, 50e9),
    "b300": GPU(2250e12, 75e12, 288e9, 8e12, 900e9, 100e9),
    "gb200": GPU(2500e12, 80e12, 186e9, 8e12, 900e9, 50e9, per_node=72),
    "gb300": GPU(2500e12, 80e12, 288e9, 8e12, 900e9, 100e9, per_node=72),
    "l40s": GPU(362e12, 91.6e12, 48e9, 864e9, PCIE4, _SERVER),
    "l40": GPU(181e12, 90.5e12, 48e9, 864e9, PCIE4, _SERVER),
    "l4": GPU(121e12, 30.3e12, 24e9, 300e9, PCIE4, _SERVER),
    "a40": GPU(149.7e12, 37.4e12, 48e9, 696e9, PCIE4, _SERVER),
    "a10": GPU(125e12, 31.2e12, 24e9, 600e9, PCIE4, _SERVER),
    "rtx-a6000": GPU(154.8e12, 38.7e12, 48e9, 768e9, PCIE4, _DESKTOP),
    "rtx-6000-ada": GPU(364.2e12, 91.1e12, 48e9, 960e9, PCIE4, _DESKTOP),
    "rtx-pro-6000": GPU(503.8e12, 126e12, 96e9, 1.792e12, PCIE5, _DESKTOP),
    "rtx-3090": GPU(71e12, 35.6e12, 24e9, 936e9, PCIE4, _DESKTOP),
    "rtx-3090-ti": GPU(80e12, 40e12, 24e9, 1.008e12, PCIE4, _DESKTOP),
    "rtx-4080": GPU(97.5e12, 48.7e12, 16e9, 717e9, PCIE4, _DESKTOP),
    "rtx-4090": GPU(165.2e12, 82.6e12, 24e9, 1.008e12, PCIE4, _DESKTOP),
    "rtx-5080": GPU(112.6e12, 56.3e12, 16e9, 960e9, PCIE5, _DESKTOP),
    "rtx-5090": GPU(209.5e12, 104.8e12, 32e9, 1.792e12, PCIE5, _DESKTOP),
}
GPUS = {name: gpu._replace(name=name) for name, gpu in _TABLE.items()}

_OTHER_MODELS = {"LAPTOP", "MIG", "SUPER", "TI", "D", "Q"}
"""A device name with one of these words is another GPU than the name without the word, or a slice of one."""

_KEYS = {"tflops": 1e12, "gib": 2**30, "gbs": 1e9, "fp32": 1e12, "link": 1e9, "network": 1e9, "per_node": 1}
"""Keys of --gpu name=…, each with its unit."""


def find_gpu(option: str) -> GPU:
    """The GPU of a --gpu option: a name of the table, "cpu" (this machine's), or name=…,tflops=…,gib=…,gbs=….

    Raises:
        UserError: the name is unknown, or the description is incomplete.
    """
    if "=" in option:
        return _described(option)
    if option == "cpu":
        return _cpu()
    plain = re.sub(r"[^a-z0-9]", "", option.lower())
    for key in (plain, f"rtx{plain}"):  # "4090", "A6000"
        for name, gpu in GPUS.items():
            if re.sub("[^a-z0-9]", "", name) == key:
                return gpu
    raise UserError(
        f"--gpu {option} is not known; use one of {', '.join(GPUS)}, cpu, or describe it in full, for example "
        f"--gpu name={plain or 'mygpu'},tflops=100,gib=24,gbs=1000"
    )


def _described(option: str) -> GPU:
    usage = "write --gpu name=mygpu,tflops=100,gib=24,gbs=1000 (bf16 TFLOP/s, GiB and GB/s of memory)"
    given: dict[str, str] = {}
    for word in option.split(","):
        key, equals, value = (part.strip() for part in word.partition("="))
        if not equals or not value or key in given or key not in {"name", *_KEYS}:
            why = "is given twice" if key in given else f"is none of name=, {'=, '.join(_KEYS)}="
            raise UserError(f"--gpu {option}: {word.strip()!r} {why}; {usage}")
        given[key] = value
    for key in ("name", "tflops", "gib", "gbs"):
        if key not in given:
            raise UserError(f"--gpu {option}: {key}= is missing; {usage}")
    name = given.pop("name")
    values = {key: _positive(option, key, value) * _KEYS[key] for key, value in given.items()}
    return GPU(
        bf16=values["tflops"],
        fp32=values.get("fp32", values["tflops"] / 16),
        memory=values["gib"],
        bandwidth=values["gbs"],
        node_link=values.get("link", PCIE4),
        network=values.get("network", _SERVER),
        per_node=int(values.get("per_node", 8)),
        name=name,
        origin="as given (assumed where not given: fp32 a 16th of bf16, link, network, 8 GPUs per_node)",
    )


def _positive(option: str, key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    whole = key != "per_node" or value == math.floor(value)
    if not 0 < value < math.inf or not whole:
        what = "a whole number of at least 1" if key == "per_node" else "a number above 0"
        raise UserError(f"--gpu {option}: {key}={text} is not {what}; write for example {key}=8")
    return value


def known_gpu(device_name: str) -> GPU | None:
    """The table's entry for a device by its CUDA name, such as "NVIDIA H100 80GB HBM3"; None if it has none."""
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    matches = []
    for name, gpu in GPUS.items():
        parts = set(name.upper().split("-"))
        if parts <= words and not (words - parts) & _OTHER_MODELS:
            matches.append((len(parts), gpu))
    return max(matches, key=lambda match: match[0])[1] if matches else None


def this_machine() -> GPU:
    """The hardware of one process of a run on this machine: its GPU, or its share of the CPU and memory."""
    if not torch.cuda.is_available():
        return _cpu()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    gpu = known_gpu(name)
    origin = "of this machine: memory as the driver reports, rates by its data sheet"
    if gpu is None:
        gpu = GPUS["a100"]._replace(name=name)
        origin = "of this machine: memory as the driver reports; its rates are not known, those of an a100 are used"
    return gpu._replace(memory=float(memory), origin=origin)


def _cpu() -> GPU:
    """One process's share of this machine's CPU.

    FLOPs per cycle: two units of fused multiply-add on full vectors. Bandwidth and link are typical values, not
    measured. bf16 is taken to be as fast as fp32.
    """
    share = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = max(1, _cores() // share)
    per_cycle = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 16)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / share
    return GPU(
        bf16=cores * _clock() * per_cycle,
        fp32=cores * _clock() * per_cycle,
        memory=memory,
        bandwidth=10e9 * cores,
        node_link=5e9,
        network=_DESKTOP,
        per_node=share,
        name="cpu",
        origin=f"of this machine, no GPU: {cores} core{'s' * (cores > 1)} and {memory / 2**30:.1f} GiB per process, "
        "rates roughly estimated from its clock",
    )


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _clock() -> float:
    """Clock of the fastest core, in Hz; 2.5 GHz if the system does not report it."""
    try:
        clocks = re.findall(r"cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        clocks = []
    return 1e6 * max(map(float, clocks), default=2500.0)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a GPU, in FLOP/s; None for a GPU that is not in the table, and for a CPU."""
    if device.type != "cuda":
        return None
    gpu = known_gpu(torch.cuda.get_device_name(device))
    return gpu.bf16 if gpu else None


def memory_gib(device: torch.device) -> float:
    """Peak memory so far, in GiB: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory in the process, for the next step, rather than return it to the system.

    A step on a CPU allocates and frees the same hundreds of megabytes. By default all beyond 64 MB at the heap's end
    return to the system each time, and the next step waits for as many page faults. The peak of memory is the same.
    Blocks above 32 MB are mapped one by one, as by default: kept in the heap, they would leave gaps.

    Returns:
        whether it was set: not outside of glibc, nor where the environment sets its MALLOC_ variables or tunables.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    return bool(mallopt(mmap_threshold, 2**25) and mallopt(trim_threshold, 2**31 - 1))


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the machine's CPU with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [platform.processor(), platform.machine()]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(": ")[2] for line in lines if line.startswith("model name")] + names
    return f"{next(filter(None, names), 'CPU')}, {os.cpu_count()} cores"
