"""The routed experts by torch.nn.functional.grouped_mm, forward and backward, through autograd as it is.

Group sizes stay on the device, so the host does not wait. Two things that it does are kept away from here: rows past
the last group, which it leaves unwritten (there are none: R rows are exactly those of all experts), and its refusal of
gradients of stride zero (what weighs the rows makes theirs).

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
        ValueError: a dtype or a width that grouped_mm does not take, or a torch without it.
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
    """See trinity_kernels.expert_engines."""
    if not hasattr(F, "grouped_mm"):
        raise ValueError(f"the experts engine grouped_mm needs torch 2.10 or later, not {torch.__version__}")


def _linear(rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return F.grouped_mm(rows_RI, weight_EOI.mT, offs=ends_E)
