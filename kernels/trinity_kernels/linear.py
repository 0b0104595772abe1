"""y = x·Wᵀ, also on a CPU whose cores have no bf16 arithmetic.

Such a CPU multiplies bf16 matrices at a fifth of its fp32 speed. The product of two bf16 numbers is exact in fp32 and
accelerators accumulate in fp32 too, so widening the operands and rounding the result once gives the same meaning.
Saved for backward: x and W as they came, not the widened copies.

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


def widens(x: Tensor) -> bool:
    """Whether matrix products of x are better done in fp32 here: bf16 on a CPU that cannot multiply it."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _cpu_has_bf16()


def widened(x: Tensor) -> Tensor:
    """x as matrix products should see it: in fp32 where that is faster, else x itself."""
    return x.float() if widens(x) else x


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
    if widens(x):
        return _WidenedLinear.apply(x, weight_OI)
    return F.linear(x, weight_OI)


linear = Op(_linear)
