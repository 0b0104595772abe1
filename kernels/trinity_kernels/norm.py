"""RMSNorm, alone and fused with the residual stream: computed in fp32, each result rounded once.

rms_norm    y = x / √(mean(x²) + ε) · g
norm_add    r = x + RMSNorm(y)·p                 at the end of a block (eq. 33)
add_norm    the same r, and u = RMSNorm(r)·g of the rounded r, between two sublayers: one pass over memory, not three

Saved for backward: the input of each norm, its gain and 1/rms per row; that is x and g, y and p, or y, p, r and g. With
x̂ = x/rms: dx = (g·dy − x̂·mean(g·dy·x̂))/rms, dg = Σ dy·x̂. In add_norm the gradient of r and that of u through u's norm
are summed in fp32; the sum is dx, and through the norm of y it gives dy.

Triton (norm_triton.py): one pass over memory; each program sums the gains' gradients of its rows in registers.

Shapes: ... any leading dimensions, D normalised width.
"""

import torch
from torch import Tensor

from trinity_kernels.op import Op

WIDEST = 4096
"""The widest row that a Triton program holds in its registers; at 8192 the backward of add_norm spills."""


def wide(x: Tensor) -> Tensor:
    """x cast to fp32, or x itself in float64: the precision in which norms, routers and losses compute."""
    return x if x.dtype == torch.float64 else x.float()


def refuses(x: Tensor, *_: object, **__: object) -> str | None:
    """Why the Triton kernels of norms and QK-norm do not support x, or None."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes 16-bit and 32-bit numbers, not {x.dtype}"
    if x.shape[-1] > WIDEST:
        return f"rows of {x.shape[-1]} numbers are wider than {WIDEST}"
    return None


def inverse_rms_of(x_wide: Tensor, eps: float) -> Tensor:
    """1/√(mean(x²) + ε) of each row, [..., 1]."""
    # vector_norm squares and sums in one pass: a third of the memory traffic of x².mean()
    square_mean = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True).square_().div_(x_wide.shape[-1])
    return square_mean.add_(eps).rsqrt_()


def differentiate_norm(grad_wide: Tensor, x: Tensor, gain_D: Tensor, inverse_rms: Tensor) -> tuple[Tensor, Tensor]:
    """Backward of the norm, up to a factor: rms·dx, a new wide tensor, and the gain's gradient.

    The caller multiplies the first by 1/rms.
    """
    gain_wide = wide(gain_D)
    unit = wide(x) * inverse_rms
    product = grad_wide * unit
    grad_gain = product.reshape(-1, gain_D.numel()).sum(dim=0).to(gain_D.dtype)
    along = (product @ gain_wide).div_(x.shape[-1]).unsqueeze(-1)
    return torch.mul(grad_wide, gain_wide, out=product).addcmul_(unit, along, value=-1), grad_gain


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        x_wide = wide(x)
        inverse_rms = inverse_rms_of(x_wide, eps)
        ctx.save_for_backward(x, gain_D, inverse_rms)
        return (x_wide * inverse_rms).mul_(wide(gain_D)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain_D, inverse_rms = ctx.saved_tensors
        scaled, grad_gain = differentiate_norm(wide(grad), x, gain_D, inverse_rms)
        return scaled.mul_(inverse_rms).to(x.dtype), grad_gain, None


class _NormAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        inverse_rms = inverse_rms_of(wide(y), eps)
        ctx.save_for_backward(y, gain_D, inverse_rms)
        return _sum(y, inverse_rms, gain_D, x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        y, gain_D, inverse_rms = ctx.saved_tensors
        scaled, grad_gain = differentiate_norm(wide(grad), y, gain_D, inverse_rms)
        return scaled.mul_(inverse_rms).to(y.dtype), grad, grad_gain, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, post_gain_D: Tensor, gain_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        inverse_y = inverse_rms_of(wide(y), eps)
        r = _sum(y, inverse_y, post_gain_D, x)
        r_wide = wide(r)
        inverse_r = inverse_rms_of(r_wide, eps)
        ctx.save_for_backward(y, post_gain_D, inverse_y, r, gain_D, inverse_r)
        return r, (r_wide * inverse_r).mul_(wide(gain_D)).to(r.dtype)

    @staticmethod
    def backward(ctx, grad_r: Tensor, grad_u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        y, post_gain_D, inverse_y, r, gain_D, inverse_r = ctx.saved_tensors
        scaled, grad_gain = differentiate_norm(wide(grad_u), r, gain_D, inverse_r)
        grad_wide = torch.addcmul(wide(grad_r), scaled, inverse_r, out=scaled)
        scaled, grad_post_gain = differentiate_norm(grad_wide, y, post_gain_D, inverse_y)
        return scaled.mul_(inverse_y).to(y.dtype), grad_wide.to(r.dtype), grad_post_gain, grad_gain, None


def _sum(y: Tensor, inverse_rms: Tensor, gain_D: Tensor, x: Tensor) -> Tensor:
    """x + ŷ·g, rounded once."""
    unit = wide(y) * inverse_rms
    return torch.addcmul(wide(x), unit, wide(gain_D), out=unit).to(x.dtype)


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


def _norm_add(y: Tensor, x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """The residual stream after a sublayer: x + RMSNorm(y) (eq. 33).

    Args:
        y: [..., D], the sublayer's output.
        x: [..., D], the residual stream before the sublayer, y's dtype.
        gain_D: [D], fp32, gain of the norm of y.
        eps: added to the mean square.
    Returns:
        [..., D], x's dtype, rounded once: the norm is not rounded before the addition.
    """
    return _NormAdd.apply(y, x, gain_D, eps)


def _add_norm(y: Tensor, x: Tensor, post_gain_D: Tensor, gain_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """norm_add, and the norm of its result that feeds the next sublayer.

    Args:
        y: [..., D], the sublayer's output.
        x: [..., D], the residual stream before the sublayer, y's dtype.
        post_gain_D: [D], fp32, gain of the norm of y.
        gain_D: [D], fp32, gain of the norm of the sum.
        eps: added to both mean squares.
    Returns:
        r = x + RMSNorm(y) and u = RMSNorm(r), both [..., D] in x's dtype; u is computed from the rounded r.
    """
    return _AddNorm.apply(y, x, post_gain_D, gain_D, eps)


rms_norm = Op(_rms_norm, "trinity_kernels.norm_triton:rms_norm", refuses)
norm_add = Op(_norm_add, "trinity_kernels.norm_triton:norm_add", refuses)
add_norm = Op(_add_norm, "trinity_kernels.norm_triton:add_norm", refuses)
