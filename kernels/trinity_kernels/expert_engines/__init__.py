"""The routed experts by other packages' grouped products: peers to measure against, and a choice of kernels.experts.

Every engine is a module with `expert_mlp(x_TD, gate_up_E2FD, down_EDF, indices_TK, s_TK, rows)`, of the same meaning as
trinity_kernels.expert_mlp, and with `package()`, which imports what it needs or raises ValueError saying what to
install. Rows are picked, weighted and summed by trinity_kernels.expert_engines.rows in all of them, without atomics;
the two products are the package's own, and so are their gradients.

    grouped_mm           torch.nn.functional.grouped_mm: bf16 on a GPU, fp32 and 16 bits on a CPU; no host sync
    megablocks           its grouped GEMM (the package grouped_gemm, CUTLASS or cuBLAS): bf16 on a GPU; a host sync
    transformer_engine   te.pytorch.GroupedLinear: 16 and 32 bits on a GPU; a host sync

The last two are NOT RUN on a GPU by this project so far: their test there compares them with the reference.
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
    """The function of one engine; its package is imported when it first runs."""
    module, function = ENGINES[name].split(":")
    return getattr(import_module(module), function)


def check_engine(name: str, device: str) -> None:
    """Refuse an engine that cannot run here, before anything is built.

    Args:
        device: its type.
    Raises:
        ValueError: in one sentence, what to install or which device it needs.
    """
    import_module(ENGINES[name].split(":")[0]).package()
    if device != "cuda" and name != "grouped_mm":
        raise ValueError(f"the experts engine {name} needs an NVIDIA GPU")


def import_package(name: str, of: str, install: str) -> ModuleType:
    """Import what an engine needs.

    Args:
        name: the module.
        of: the engine.
        install: the command that installs it.
    Raises:
        ValueError: it cannot be imported, and how to install it.
    """
    try:
        return import_module(name)
    except Exception as error:  # a package half installed fails in its own way: a missing library, a version of torch
        why = str(error).partition("\n")[0]
        raise ValueError(f"the experts engine {of} needs {name} ({why}); install it: {install}") from error
