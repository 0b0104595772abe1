"""The routed experts by MegaBlocks' grouped GEMM (Gale et al., arXiv 2211.15841), as its GroupedGLU uses it.

It supports bf16 on a GPU. It needs the group sizes on the host, so the host waits for the device once per call.

Shapes: see trinity_kernels.expert_engines.rows.
"""

from types import ModuleType

import torch
from torch import Tensor

from trinity_kernels.expert_engines import import_package
from trinity_kernels.expert_engines.rows import expert_mlp_by


def expert_mlp(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, indices_TK: Tensor, s_TK: Tensor, rows: int | None = None
) -> Tensor:
    """See trinity_kernels.expert_mlp; bf16 on a GPU.

    Raises:
        ValueError: the package is missing, or does not support the tensors.
    """
    ops = package()
    if not (x_TD.is_cuda and x_TD.dtype == torch.bfloat16):
        raise ValueError(
            f"the experts engine megablocks takes bfloat16 on a GPU, not {x_TD.dtype} on the {x_TD.device.type}; "
            "use auto"
        )
    sizes: list[Tensor] = []  # computed once per call and shared by both products

    def linear(rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        if not sizes:
            sizes.append(ends_E.diff(prepend=ends_E.new_zeros(1)).to("cpu", torch.int64))
        return ops.gmm(rows_RI.contiguous(), weight_EOI, sizes[0], trans_b=True)

    return expert_mlp_by(linear, x_TD, gate_up_E2FD, down_EDF, indices_TK, s_TK, rows)


def package() -> ModuleType:
    """Import megablocks' grouped_gemm_util.ops, the package grouped_gemm; see trinity_kernels.expert_engines."""
    install = (
        "pip install --no-deps --no-build-isolation megablocks==0.10.0 grouped_gemm==0.3.0 stanford-stk==0.7.1, "
        "on a machine with a GPU"
    )
    import_package("megablocks", "megablocks", install)
    import_package("grouped_gemm", "megablocks", install)
    return import_package("megablocks.grouped_gemm_util", "megablocks", install).ops
