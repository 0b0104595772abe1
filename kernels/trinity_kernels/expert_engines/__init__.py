"""The routed experts with the grouped products of other packages, as baselines and as choices of kernels.experts.

Each engine is a module with `expert_mlp(x_TD, gate_up_E2FD, down_EDF, indices_TK, s_TK, rows)`, which means the same as
trinity_kernels.expert_mlp, and with `package()`, which imports the package or raises ValueError with the command that
installs it. In all engines, trinity_kernels.expert_engines.rows gathers, weights and sums the rows, without atomics;
the two products and their gradients are the package's.

    grouped_mm           torch.nn.functional.grouped_mm: bf16 on a GPU, fp32 and 16 bits on a CPU; no host sync
    megablocks           its grouped GEMM (the package grouped_gemm, CUTLASS or cuBLAS): bf16 on a GPU; a host sync
    transformer_engine   te.pytorch.GroupedLinear: 16 and 32 bits on a GPU; a host sync

This project has NOT RUN the last two on a GPU yet; their test there compares them with the reference.

Shapes: see trinity_kernels.expert_engines.rows.
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from torch import Tensor

ENGINES = {
    "grouped_mm": "trinity_kernels.expert_engines.grouped_mm:expert_mlp",
    "megablocks": "trinity_kernels.expert_engines.megablocks:expert_mlp",
    "transformer_engine": "trinity_kernels.expert_engines.transformer_engine:expert_mlp",
}
"""Name → module:function."""


def engine(name: str) -> Callable[..., Tensor]:
    """The function of one engine; it imports its package at the first call."""
    module, function = ENGINES[name].split(":")
    return getattr(import_module(module), function)


def check_engine(name: str, device: str) -> None:
    """Check, before a model is built, that an engine can run.

    Args:
        device: the device type.
    Raises:
        ValueError: in one sentence, the package to install or the device it needs.
    """
    import_module(ENGINES[name].split(":")[0]).package()
    if device != "cuda" and name != "grouped_mm":
        raise ValueError(f"the experts engine {name} needs an NVIDIA GPU")


def import_package(name: str, of: str, install: str) -> ModuleType:
    """Import a module that an engine needs.

    Args:
        name: the module.
        of: the engine.
        install: the command that installs it.
    Raises:
        ValueError: the module cannot be imported; the message names the command.
    """
    try:
        return import_module(name)
    except Exception as error:  # not only ImportError: a broken installation also fails on a library or torch version
        why = str(error).partition("\n")[0]
        raise ValueError(f"the experts engine {of} needs {name} ({why}); install it: {install}") from error
