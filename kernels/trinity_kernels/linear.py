"""The linear layer without bias: y = x·Wᵀ, also on CPUs without bf16 arithmetic.

A CPU without bf16 arithmetic multiplies bf16 matrices at a fifth of its fp32 speed. There the operands are cast to fp32
and the result is rounded once: the product of two bf16 numbers is exact in fp32, and accelerators accumulate in fp32
too, so the meaning is the same.
Saved for backward: x and W in their own dtype. There is no Triton version: torch's product is used everywhere.

Shapes: ... any leading dimensions, I input width, O output width.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity_kernels.op import Op


@cache
def _cpu_has_bf16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def multiplies_in_fp32(x: Tensor) -> bool:
    """Whether matrix products of x are computed in fp32: x is bf16 on a CPU without bf16 arithmetic."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _cpu_has_bf16()


def matmul_operand(x: Tensor) -> Tensor:
    """x as the operand of a matrix product: cast to fp32 if `multiplies_in_fp32(x)`, otherwise x itself."""
    return x.float() if multiplies_in_fp32(x) else x


class _WidenedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return F.linear(x.float(), weight_OI.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        grad_wide = grad.float()
        grad_x = (grad_wide @ weight_OI.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None
        outputs, inputs = weight_OI.shape
        grad_weight = grad_wide.reshape(-1, outputs).t() @ x.float().reshape(-1, inputs)
        return grad_x, grad_weight.to(weight_OI.dtype)


def _linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x·Wᵀ without bias.

    Args:
        x: [..., I], floating point.
        weight_OI: [O, I], same dtype.
    Returns:
        [..., O], same dtype; accumulated in at least fp32.
    """
    if multiplies_in_fp32(x):
        return _WidenedLinear.apply(x, weight_OI)
    return F.linear(x, weight_OI)


linear = Op(_linear)
