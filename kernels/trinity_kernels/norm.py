"""RMSNorm: y = x / √(mean(x²) + ε) · g, in fp32 throughout and rounded once at the end.

Saved for backward: x, g and 1/rms per row. With x̂ = x/rms: dx = (g·dy − x̂·mean(g·dy·x̂))/rms, dg = Σ dy·x̂.

Shapes: ... any leading dimensions, D normalised width.
"""

import torch
from torch import Tensor

from trinity_kernels.op import Op


def wide(x: Tensor) -> Tensor:
    """x in fp32, or as it is in float64: the precision in which norms, routers and losses compute."""
    return x if x.dtype == torch.float64 else x.float()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        x_wide = wide(x)
        # vector_norm squares and sums in one pass: a third of the memory traffic of x².mean()
        square_mean = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse_rms = square_mean.add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain_D, inverse_rms)
        return (x_wide * inverse_rms).mul_(wide(gain_D)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain_D, inverse_rms = ctx.saved_tensors
        gain_wide, grad_wide = wide(gain_D), wide(grad)
        unit = wide(x) * inverse_rms
        product = grad_wide * unit
        grad_gain = product.reshape(-1, gain_D.numel()).sum(dim=0).to(gain_D.dtype)
        along = (product @ gain_wide).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = torch.mul(grad_wide, gain_wide, out=product).addcmul_(unit, along, value=-1).mul_(inverse_rms)
        return grad_x.to(x.dtype), grad_gain, None


def _rms_norm(x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension (Zhang & Sennrich, arXiv 1910.07467).

    Args:
        x: [..., D], floating point.
        gain_D: [D], fp32 (any floating point is widened).
        eps: added to the mean square.
    Returns:
        [..., D], x's dtype; the gain is multiplied in fp32, then the result is rounded.
    """
    return _RMSNorm.apply(x, gain_D, eps)


rms_norm = Op(_rms_norm)
