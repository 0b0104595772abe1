"""The routed experts by Transformer Engine's GroupedLinear: one cuBLAS product per expert, on several streams.

The GroupedLinear is built on the meta device, without memory; each call replaces its parameters by the model's weights,
so that parameter names, optimizer and checkpoints do not change. It needs the group sizes on the host, so the host
waits for the device once per call.

Shapes: see trinity_kernels.expert_engines.rows.
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn

from trinity_kernels.expert_engines import import_package
from trinity_kernels.expert_engines.rows import expert_mlp_by


def expert_mlp(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, indices_TK: Tensor, s_TK: Tensor, rows: int | None = None
) -> Tensor:
    """See trinity_kernels.expert_mlp; 16 and 32 bits on a GPU.

    Raises:
        ValueError: the package is missing, or does not support the tensors.
    """
    package()
    if not x_TD.is_cuda or x_TD.dtype == torch.float64:
        raise ValueError(
            f"the experts engine transformer_engine takes 16 and 32 bits on a GPU, not {x_TD.dtype} on the "
            f"{x_TD.device.type}; use auto"
        )
    sizes: list[list[int]] = []  # computed once per call and shared by both products

    def linear(rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        if not sizes:
            sizes.append(ends_E.diff(prepend=ends_E.new_zeros(1)).tolist())
        weights = {f"weight{expert}": weight for expert, weight in enumerate(weight_EOI.unbind())}
        shell = _shell(*weight_EOI.shape, weight_EOI.dtype)
        return torch.func.functional_call(shell, weights, (rows_RI.contiguous(), sizes[0]))

    return expert_mlp_by(linear, x_TD, gate_up_E2FD, down_EDF, indices_TK, s_TK, rows)


def package() -> ModuleType:
    """Import transformer_engine.pytorch; see trinity_kernels.expert_engines."""
    install = "pip install --no-build-isolation 'transformer-engine[pytorch,core-cu13]', on a machine with a GPU"
    return import_package("transformer_engine.pytorch", "transformer_engine", install)


@cache
def _shell(experts: int, outputs: int, inputs: int, dtype: torch.dtype) -> nn.Module:
    return package().GroupedLinear(experts, inputs, outputs, bias=False, params_dtype=dtype, device="meta")
