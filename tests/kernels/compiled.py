"""Compile Triton kernels for Hopper without a GPU, as real calls would: python compiled.py MODULE…

Each module is a test helper with `CASES`, name → function. The function calls launchers with tensors on the "meta"
device, of the real models' shapes; every launch in it is compiled for sm_90 with the very specialisation such a call
has, and not run. Prints one JSON list: case, kernel, constants, warps, stages, registers, spilled bytes, shared bytes,
and how many HGMMA (Hopper's matrix instruction) and HMMA (its slow forerunner) the machine code holds.

Needs a process of its own: elsewhere kernels are interpreted.
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
    """What Triton asks a driver while it compiles."""

    def get_current_target(self) -> GPUTarget:
        """sm_90."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """None to speak of."""
        return 0


def compile_instead_of_running(found: list[dict[str, Any]]) -> None:
    """From now on a launch compiles, and what came of it goes into found; the same kernel only once."""
    triton.runtime.driver.set_active(Hopper())
    run, seen = JITFunction.run, set()

    def compile_(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            names = dict(zip(self.arg_names, args)) | kwargs
            constants = {
                name: value for name, value in names.items()
                if name.isupper() and isinstance(value, int | bool | str)
            }  # fmt: skip
            found.append({"kernel": self.__name__, "constants": constants, **report(kernel)})
        return kernel

    JITFunction.run = compile_


def report(kernel: Any) -> dict[str, int]:
    """What the machine code of a compiled kernel uses."""
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
    found: list[dict[str, Any]] = []
    compile_instead_of_running(found)
    for name in sys.argv[1:]:
        for case, call in importlib.import_module(name).CASES.items():
            before = len(found)
            with torch.device("meta"):
                call()
            for kernel in found[before:]:
                kernel["case"] = case
    print(json.dumps(found))


if __name__ == "__main__":
    main()
