"""Compile Triton kernels for Hopper without a GPU, as real calls would: python -m tests.kernels.compiled MODULE…

Each module is a test helper with `CASES`, name → function. The function calls launchers with tensors on the "meta"
device, of the real models' shapes; every launch in it is compiled for sm_90, with the specialisation of that call,
and not run. Prints one JSON list: case, kernel, constants, warps, stages, registers, spilled bytes, shared bytes,
and how many HGMMA (Hopper's matrix instruction) and HMMA (its slow predecessor) the machine code holds.

Needs a process of its own, because the other tests interpret kernels.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Hopper:
    """The driver methods that Triton calls while it compiles."""

    def get_current_target(self) -> GPUTarget:
        """sm_90."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """Device 0."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0


def compile_instead_of_running(reports: list[dict[str, Any]]) -> None:
    """Make every later launch compile and append a report, once per kernel."""
    triton.runtime.driver.set_active(Hopper())
    run, hashes = JITFunction.run, set()

    def compile_(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in hashes:
            hashes.add(kernel.hash)
            names = dict(zip(self.arg_names, args)) | kwargs
            constants = {
                name: value for name, value in names.items()
                if name.isupper() and isinstance(value, int | bool | str)
            }  # fmt: skip
            reports.append({"kernel": self.__name__, "constants": constants, **report(kernel)})
        return kernel

    JITFunction.run = compile_


def report(kernel: Any) -> dict[str, int]:
    """Resources used by the machine code of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        code = subprocess.run([TOOLS / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
    return {
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spills": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "shared": kernel.metadata.shared,
        "hgmma": len(re.findall(r"\bHGMMA", code)),
        "hmma": len(re.findall(r"\bHMMA", code)),
    }


def main() -> None:
    """Compile every case of the modules named on the command line."""
    reports: list[dict[str, Any]] = []
    compile_instead_of_running(reports)
    for name in sys.argv[1:]:
        for case, call in importlib.import_module(name).CASES.items():
            before = len(reports)
            with torch.device("meta"):
                call()
            for kernel in reports[before:]:
                kernel["case"] = case
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
