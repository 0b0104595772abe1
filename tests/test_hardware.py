"""The table of GPUs, their CUDA names, GPUs described by --gpu, and this machine."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from trinity import hardware
from trinity.errors import UserError
from trinity.hardware import GPU, GPUS, find_gpu, known_gpu, peak_flops, this_machine


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA B300 SXM6 AC", "b300"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("NVIDIA GeForce RTX 3090 Ti", "rtx-3090-ti"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 5090", "rtx-5090"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("Tesla T4", None),
    ],
)
def test_names_of_devices(device: str, name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names as nvidia-smi prints them; a similar name of another model is unknown and has no peak for MFU."""
    assert known_gpu(device) == (GPUS[name] if name else None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    assert peak_flops(torch.device("cuda", 0)) == (GPUS[name].bf16 if name else None)


def test_table() -> None:
    """Plausible values: tensor cores faster than fp32 units, links slower than memory; names equal the keys."""
    assert (GPUS["h100"].bf16, GPUS["l40s"].bf16, GPUS["rtx-4090"].bf16) == (989e12, 362e12, 165.2e12)
    for name, gpu in GPUS.items():
        assert gpu.name == name
        assert gpu.bf16 > gpu.fp32 > 0
        assert gpu.memory < gpu.bandwidth
        assert gpu.network <= gpu.node_link < gpu.bandwidth
        assert find_gpu(name) == find_gpu(name.upper()) == gpu


def test_spellings_of_names() -> None:
    """Without prefix, spaces or hyphens."""
    assert find_gpu("RTX 4090") == find_gpu("4090") == find_gpu("rtx4090") == GPUS["rtx-4090"]
    assert find_gpu("A6000") == GPUS["rtx-a6000"]


def test_described() -> None:
    """Units TFLOP/s, GiB, GB/s; assumed values are named in origin."""
    gpu = find_gpu("name=mine,tflops=100,gib=24,gbs=1000")
    assert gpu[:4] == (100e12, 100e12 / 16, 24 * 2**30, 1e12)
    assert gpu[4:8] == (31.5e9, 12.5e9, 8, "mine")
    assert "assumed" in gpu.origin
    whole = find_gpu("name=x, tflops=1.5, gib=2, gbs=3, fp32=0.5, link=7, network=6, per_node=4")
    assert whole[:8] == (1.5e12, 0.5e12, 2 * 2**30, 3e9, 7e9, 6e9, 4, "x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("rtx9999", "--gpu rtx9999 is not known; use one of a100, "),
        ("", "is not known"),
        ("name=x,tflops=9,gib=4", "gbs= is missing"),
        ("tflops=9,gib=4,gbs=3", "name= is missing"),
        ("name=x,tflops=fast,gib=4,gbs=3", "tflops=fast is not a number above 0; write for example tflops=8"),
        ("name=x,tflops=nan,gib=4,gbs=3", "tflops=nan is not a number above 0"),
        ("name=x,tflops=9,gib=-4,gbs=3", "gib=-4 is not a number above 0"),
        ("name=x,tflops=9,gib=4,gbs=3,per_node=1.5", "per_node=1.5 is not a whole number of at least 1"),
        ("name=x,tflops=9,gib=4,gbs=3,per_node=0.5", "per_node=0.5 is not a whole number of at least 1"),
        ("name=x,tflops=9,tflops=8,gib=4,gbs=3", "'tflops=8' is given twice"),
        ("name=x,flops=9,gib=4,gbs=3", "'flops=9' is none of name=, tflops=, gib=, gbs=, "),
        ("name=x,tflops,gib=4,gbs=3", "'tflops' is none of"),
    ],
)
def test_refusals(words: str, message: str) -> None:
    """One sentence each; the example description in it is accepted."""
    with pytest.raises(UserError) as refused:
        find_gpu(words)
    assert message in str(refused.value)
    for option in str(refused.value).split("--gpu ")[2:]:
        assert find_gpu(option.split(" (")[0]).bandwidth == 1e12


def test_this_machine_is_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from the driver, rates from the table; for an unknown GPU those of an a100, as origin says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=25 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce RTX 4090")
    assert this_machine()[:8] == GPUS["rtx-4090"]._replace(memory=25 * 2**30)[:8]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    gpu = this_machine()
    assert (gpu.name, gpu.memory, gpu.bf16) == ("Some GPU", 25 * 2**30, GPUS["a100"].bf16)
    assert "not known" in gpu.origin


def test_this_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """From cores, clock and vector width; processes of one machine share cores and memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "_cores", lambda: 16)
    monkeypatch.setattr(hardware, "_clock", lambda: 3e9)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    alone: GPU = this_machine()
    assert (alone.name, alone.bf16, alone.memory) == ("cpu", 16 * 3e9 * 32, memory)
    assert f"16 cores and {memory / 2**30:.1f} GiB" in alone.origin
    assert find_gpu("cpu") == alone
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    shared = this_machine()
    assert (shared.bf16, shared.memory, shared.per_node) == (alone.bf16 / 4, memory / 4, 4)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_memory_is_kept_unless_the_user_chose() -> None:
    """Ten blocks of 16 MB, again and again, cause page faults once; the user's MALLOC_ variables are obeyed."""
    program = """
import ctypes, resource
from trinity.hardware import keep_freed_memory
libc, kept, size = ctypes.CDLL(None), keep_freed_memory(), 2**24
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(size) for _ in range(10)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    for variables, keeps in (({}, True), ({"MALLOC_ARENA_MAX": "8"}, False)):
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        run = subprocess.run(
            [sys.executable, "-c", program], env=clean | variables, capture_output=True, text=True, check=True
        )
        kept, faults = run.stdout.split()
        assert kept == str(keeps)
        assert (int(faults) < 8000) == keeps, faults  # 160 MB are 40,960 pages
