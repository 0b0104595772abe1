"""RMSNorm of queries or keys over the head width, followed by RoPE or by nothing (NoPE), as one op.

n = x / √(mean(x²) + ε) · g over the C features of each head; with a rotation, each pair (n_i, n_{i+C/2}) is rotated by
its token's angle (rotate-half, Su et al., arXiv 2104.09864). Computed in fp32 and rounded once: n is not rounded before
the rotation.

Saved for backward: x, which may be a view of the fused projection, g, 1/rms per head, cos and sin. Backward rotates the
gradient by the opposite angle and then differentiates the norm.
Triton (qk_norm_triton.py): one pass over memory; 1/rms is not saved but computed again.

Shapes: B batch, S sequence, H heads, C head width.
"""

import torch
from torch import Tensor

from trinity_kernels.norm import differentiate_norm, inverse_rms_of, wide
from trinity_kernels.norm import refuses as norm_refuses
from trinity_kernels.op import Op
from trinity_kernels.split import GradientSlice

WIDEST_HEAD = 2048
"""The widest head that a Triton program holds in its registers."""


def rotate(x_BSHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i+C/2}) by its angle, in cos's dtype, rounded once to x's dtype. Not differentiable.

    Args:
        cos, sin: [B or 1, S, 1, C/2], fp32 or float64.
    """
    out = torch.empty(x_BSHC.shape, dtype=cos.dtype, device=x_BSHC.device)
    first, second = x_BSHC.to(cos.dtype).chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out.to(x_BSHC.dtype)


class _QKNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x_BSHC: Tensor, gain_C: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None,
        into: GradientSlice | None,
    ) -> Tensor:  # fmt: skip
        x_wide = wide(x_BSHC)
        inverse_rms = inverse_rms_of(x_wide, eps)
        ctx.save_for_backward(x_BSHC, gain_C, inverse_rms, cos, sin)
        ctx.into = into
        out = (x_wide * inverse_rms).mul_(wide(gain_C))
        return (out if cos is None or sin is None else rotate(out, cos, sin)).to(x_BSHC.dtype)

    @staticmethod
    def backward(ctx, grad_BSHC: Tensor) -> tuple[Tensor | None, ...]:
        x_BSHC, gain_C, inverse_rms, cos, sin = ctx.saved_tensors
        grad = wide(grad_BSHC)
        grad = grad if cos is None or sin is None else rotate(grad, cos, -sin)
        scaled, grad_gain = differentiate_norm(grad, x_BSHC, gain_C, inverse_rms)
        out = None if ctx.into is None else ctx.into.take(x_BSHC.shape)
        if out is None:
            grad_x = scaled.mul_(inverse_rms).to(x_BSHC.dtype)
        else:
            grad_x = torch.mul(scaled, inverse_rms, out=out)
        return grad_x, grad_gain, None, None, None, None


def _qk_norm(
    x_BSHC: Tensor,
    gain_C: Tensor,
    eps: float,
    rotation: tuple[Tensor, Tensor] | None = None,
    into: GradientSlice | None = None,
) -> Tensor:
    """RMSNorm over the head width, then the rotation if there is one.

    Args:
        x_BSHC: [B, S, H, C], floating point, any strides; C is even.
        gain_C: [C], fp32 (any floating point is widened).
        eps: added to the mean square.
        rotation: cos and sin [B or 1, S, 1, C/2] in fp32 (float64 for a float64 x), one angle per pair of features;
            None: no positional encoding. They get no gradient.
        into: where x's gradient belongs, if x is a part of split_projection.
    Returns:
        [B, S, H, C], x's dtype.
    """
    cos, sin = (None, None) if rotation is None else rotation
    return _QKNorm.apply(x_BSHC, gain_C, eps, cos, sin, into)


def _refuses(x_BSHC: Tensor, *_: object, **__: object) -> str | None:
    if x_BSHC.shape[-1] % 2:
        return f"heads of {x_BSHC.shape[-1]} features have no two halves"
    if x_BSHC.shape[-1] > WIDEST_HEAD:
        return f"heads of {x_BSHC.shape[-1]} features are wider than {WIDEST_HEAD}"
    return norm_refuses(x_BSHC)


qk_norm = Op(_qk_norm, "trinity_kernels.qk_norm_triton:qk_norm", _refuses)
