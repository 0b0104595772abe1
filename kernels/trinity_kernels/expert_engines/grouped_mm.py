"""The routed experts by torch.nn.functional.grouped_mm, forward and backward through autograd.

Group sizes stay on the device, so the host does not wait. Two limits of grouped_mm do not matter here: it leaves rows
past the last group unwritten (there are none: the R rows are exactly those of all experts), and it refuses gradients of
stride zero (the weighting of rows makes contiguous ones).

Shapes: see trinity_kernels.expert_engines.rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity_kernels.expert_engines.rows import expert_mlp_by


def expert_mlp(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, indices_TK: Tensor, s_TK: Tensor, rows: int | None = None
) -> Tensor:
    """See trinity_kernels.expert_mlp; bf16 on a GPU, fp32 and 16 bits on a CPU.

    Raises:
        ValueError: grouped_mm does not support the dtype or a width, or this torch does not have it.
    """
    package()
    taken = (torch.bfloat16,) if x_TD.is_cuda else (torch.float32, torch.float16, torch.bfloat16)
    if x_TD.dtype not in taken:
        raise ValueError(
            f"the experts engine grouped_mm takes {' or '.join(map(str, taken))} on the {x_TD.device.type}, "
            f"not {x_TD.dtype}; use auto"
        )
    for width in (x_TD.shape[1], down_EDF.shape[2]):
        if width * x_TD.element_size() % 16:
            raise ValueError(f"the experts engine grouped_mm takes rows of 16·n bytes, not {width} numbers; use auto")
    return expert_mlp_by(_linear, x_TD, gate_up_E2FD, down_EDF, indices_TK, s_TK, rows)


def package() -> None:
    """Check that torch has grouped_mm; see trinity_kernels.expert_engines."""
    if not hasattr(F, "grouped_mm"):
        raise ValueError(f"the experts engine grouped_mm needs torch 2.10 or later, not {torch.__version__}")


def _linear(rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return F.grouped_mm(rows_RI, weight_EOI.mT, offs=ends_E)
