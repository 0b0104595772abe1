"""RMSNorm of queries or keys and RoPE in Triton: one pass over memory forward, one backward.

A program takes several tokens and loops over their heads, so it reads angles and gain once. The two halves of a head
are two tiles, so both numbers of a rotated pair are in the same thread. x may be strided, as a part of the fused
projection. Each program sums the gain's gradient in registers and writes it to a row of its own, [programs, C]; torch
adds the rows: no atomics. 1/rms is not saved: backward reads x anyway and computes it with one more sum.

Saved for backward: x, g, cos and sin.

Shapes: B batch, S sequence, T = B·S tokens, H heads, C head width, P programs.
"""

import torch
from torch import Tensor

from trinity_kernels.custom_op import custom_op
from trinity_kernels.language import cdiv, next_power_of_2, tl, triton
from trinity_kernels.split import GradientSlice

WARPS = 4
STAGES = 3
"""Heads in flight in the loop over heads, the current one included."""


def tile(head_dim: int) -> dict[str, int]:
    """At most 1024 numbers of each half; with heads of 128 that is 8 per thread, 16 bytes in bf16."""
    half = next_power_of_2(head_dim // 2)
    return {"BLOCK_T": min(16, 1024 // half), "BLOCK_C": half, "STAGES": STAGES, "num_warps": WARPS}


def qk_norm(
    x_BSHC: Tensor,
    gain_C: Tensor,
    eps: float,
    rotation: tuple[Tensor, Tensor] | None = None,
    into: GradientSlice | None = None,
) -> Tensor:
    """See trinity_kernels.qk_norm."""
    cos, sin = (None, None) if rotation is None else (part.contiguous() for part in rotation)
    if into is None:
        return forward_op(x_BSHC, gain_C, eps, cos, sin)
    return _QKNorm.apply(x_BSHC, gain_C, eps, cos, sin, into)


def forward(x_BSHC: Tensor, gain_C: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Normalised and rotated x, [B, S, H, C] contiguous."""
    x_BSHC = _contiguous_heads(x_BSHC)
    out = x_BSHC.new_empty(x_BSHC.shape)
    if out.numel():
        qk_norm_kernel[_grid(x_BSHC)](
            x_BSHC, gain_C, *_angles(x_BSHC, cos, sin), out, eps, *_sizes(x_BSHC, cos), *x_BSHC.stride()[:3],
            **_options(x_BSHC, cos),
        )  # fmt: skip
    return out


def backward(
    grad_BSHC: Tensor, x_BSHC: Tensor, gain_C: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None,
    into_BSHC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x [B, S, H, C], contiguous or in `into_BSHC`, whose heads are contiguous; and of the gain."""
    grad_BSHC, x_BSHC = _contiguous_heads(grad_BSHC), _contiguous_heads(x_BSHC)
    grad_x = x_BSHC.new_empty(x_BSHC.shape) if into_BSHC is None else into_BSHC
    sums_PC = gain_C.new_empty(*_grid(x_BSHC), len(gain_C), dtype=torch.float32)
    if grad_x.numel():
        qk_norm_backward_kernel[_grid(x_BSHC)](
            grad_BSHC, x_BSHC, gain_C, *_angles(x_BSHC, cos, sin), grad_x, sums_PC, eps, *_sizes(x_BSHC, cos),
            *grad_BSHC.stride()[:3], *x_BSHC.stride()[:3], *grad_x.stride()[:3], **_options(x_BSHC, cos),
        )  # fmt: skip
    return grad_x, sums_PC.sum(dim=0).to(gain_C.dtype)


def _contiguous_heads(x_BSHC: Tensor) -> Tensor:
    """x itself if the features of a head are contiguous, as in every part of a projection; otherwise a copy."""
    return x_BSHC if x_BSHC.stride(-1) == 1 else x_BSHC.contiguous()


def _grid(x_BSHC: Tensor) -> tuple[int]:
    return (cdiv(x_BSHC.shape[0] * x_BSHC.shape[1], tile(x_BSHC.shape[-1])["BLOCK_T"]),)


def _angles(x_BSHC: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor]:
    """cos and sin; without a rotation, any tensor as a placeholder."""
    return (x_BSHC, x_BSHC) if cos is None or sin is None else (cos, sin)


def _sizes(x_BSHC: Tensor, cos: Tensor | None) -> tuple[int, ...]:
    """T, S, H, C/2, and the step in tokens of the angles from one row of the batch to the next."""
    B, S, H, C = x_BSHC.shape
    return B * S, S, H, C // 2, 0 if cos is None or len(cos) == 1 else S


def _options(x_BSHC: Tensor, cos: Tensor | None) -> dict[str, int | bool]:
    return {"TURN": cos is not None, **tile(x_BSHC.shape[-1])}


@triton.jit
def qk_norm_kernel(
    x, gain, cosines, sines, out, eps, T, S, H, half, angle_step, x_b, x_s, x_h,
    TURN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All heads of BLOCK_T tokens."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    feature = tl.arange(0, BLOCK_C)[None, :]
    inside = (token < T) & (feature < half)
    gain_1 = tl.load(gain + feature, mask=feature < half, other=0.0).to(tl.float32)
    gain_2 = tl.load(gain + half + feature, mask=feature < half, other=0.0).to(tl.float32)
    if TURN:
        cos, sin = _rotation_of(cosines, sines, token, feature, inside, S, half, angle_step)
    from_ = x + (token // S).to(tl.int64) * x_b + (token % S).to(tl.int64) * x_s + feature
    to = out + token.to(tl.int64) * H * (2 * half) + feature
    for head in tl.range(0, H, num_stages=STAGES):
        x_1 = tl.load(from_ + head * x_h, mask=inside, other=0.0).to(tl.float32)
        x_2 = tl.load(from_ + head * x_h + half, mask=inside, other=0.0).to(tl.float32)
        inverse = _inverse_rms(x_1, x_2, half, eps)
        n_1, n_2 = x_1 * inverse * gain_1, x_2 * inverse * gain_2
        if TURN:
            n_1, n_2 = n_1 * cos - n_2 * sin, n_2 * cos + n_1 * sin
        tl.store(to + head * (2 * half), n_1.to(out.dtype.element_ty), mask=inside)
        tl.store(to + head * (2 * half) + half, n_2.to(out.dtype.element_ty), mask=inside)


@triton.jit
def qk_norm_backward_kernel(
    grad, x, gain, cosines, sines, grad_x, sums, eps, T, S, H, half, angle_step,
    grad_b, grad_s, grad_h, x_b, x_s, x_h, out_b, out_s, out_h,
    TURN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of all heads of BLOCK_T tokens, and this program's share of the gain's gradient."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    feature = tl.arange(0, BLOCK_C)[None, :]
    inside = (token < T) & (feature < half)
    gain_1 = tl.load(gain + feature, mask=feature < half, other=0.0).to(tl.float32)
    gain_2 = tl.load(gain + half + feature, mask=feature < half, other=0.0).to(tl.float32)
    if TURN:
        cos, sin = _rotation_of(cosines, sines, token, feature, inside, S, half, angle_step)
    row, place = (token // S).to(tl.int64), (token % S).to(tl.int64)
    from_grad = grad + row * grad_b + place * grad_s + feature
    from_x = x + row * x_b + place * x_s + feature
    to = grad_x + row * out_b + place * out_s + feature
    total_1 = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    total_2 = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for head in tl.range(0, H, num_stages=STAGES):
        d_1 = tl.load(from_grad + head * grad_h, mask=inside, other=0.0).to(tl.float32)
        d_2 = tl.load(from_grad + head * grad_h + half, mask=inside, other=0.0).to(tl.float32)
        if TURN:  # by the opposite angle
            d_1, d_2 = d_1 * cos + d_2 * sin, d_2 * cos - d_1 * sin
        x_1 = tl.load(from_x + head * x_h, mask=inside, other=0.0).to(tl.float32)
        x_2 = tl.load(from_x + head * x_h + half, mask=inside, other=0.0).to(tl.float32)
        inverse = _inverse_rms(x_1, x_2, half, eps)
        unit_1, unit_2 = x_1 * inverse, x_2 * inverse
        total_1 += d_1 * unit_1
        total_2 += d_2 * unit_2
        d_1, d_2 = d_1 * gain_1, d_2 * gain_2
        along = tl.sum(d_1 * unit_1 + d_2 * unit_2, axis=1, keep_dims=True) / (2 * half)
        d_1, d_2 = (d_1 - unit_1 * along) * inverse, (d_2 - unit_2 * along) * inverse
        tl.store(to + head * out_h, d_1.to(grad_x.dtype.element_ty), mask=inside)
        tl.store(to + head * out_h + half, d_2.to(grad_x.dtype.element_ty), mask=inside)
    place = sums + tl.program_id(0).to(tl.int64) * (2 * half) + feature
    tl.store(place, tl.sum(total_1, axis=0, keep_dims=True), mask=feature < half)
    tl.store(place + half, tl.sum(total_2, axis=0, keep_dims=True), mask=feature < half)


@triton.jit
def _rotation_of(cosines, sines, token, feature, inside, S, half, angle_step):
    """cos and sin of each token's angles; angle_step is 0 if all rows of the batch have the same positions."""
    place = ((token // S) * angle_step + token % S).to(tl.int64) * half + feature
    return tl.load(cosines + place, mask=inside, other=0.0), tl.load(sines + place, mask=inside, other=0.0)


@triton.jit
def _inverse_rms(x_1, x_2, half, eps):
    """1/√(mean(x²) + ε) of each head."""
    return tl.rsqrt(tl.sum(x_1 * x_1 + x_2 * x_2, axis=1, keep_dims=True) / (2 * half) + eps)


@custom_op("trinity::qk_norm_triton")
def forward_op(x_BSHC: Tensor, gain_C: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """`forward` as a custom op, known to autograd, torch.compile and recompute."""
    return forward(x_BSHC, gain_C, eps, cos, sin)


@forward_op.register_fake
def _(x_BSHC: Tensor, gain_C: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    return x_BSHC.new_empty(x_BSHC.shape)


@custom_op("trinity::qk_norm_triton_backward")
def backward_op(
    grad_BSHC: Tensor, x_BSHC: Tensor, gain_C: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`backward` as a custom op."""
    return backward(grad_BSHC, x_BSHC, gain_C, eps, cos, sin)


@backward_op.register_fake
def _(
    grad_BSHC: Tensor, x_BSHC: Tensor, gain_C: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x_BSHC.new_empty(x_BSHC.shape), torch.empty_like(gain_C)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    x_BSHC, gain_C, ctx.eps, cos, sin = inputs
    ctx.save_for_backward(x_BSHC, gain_C, cos, sin)


def _differentiate(ctx, grad_BSHC: Tensor) -> tuple[Tensor | None, ...]:
    x_BSHC, gain_C, cos, sin = ctx.saved_tensors
    return *backward_op(grad_BSHC, x_BSHC, gain_C, ctx.eps, cos, sin), None, None, None


forward_op.register_autograd(_differentiate, setup_context=_save)


class _QKNorm(torch.autograd.Function):
    """The op in eager mode, with a gradient of x that is written into a slice; a custom op cannot alias one."""

    @staticmethod
    def forward(
        ctx, x_BSHC: Tensor, gain_C: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None, into: GradientSlice
    ) -> Tensor:
        ctx.save_for_backward(x_BSHC, gain_C, cos, sin)
        ctx.eps, ctx.into = eps, into
        return forward(x_BSHC, gain_C, eps, cos, sin)

    @staticmethod
    def backward(ctx, grad_BSHC: Tensor) -> tuple[Tensor | None, ...]:
        x_BSHC, gain_C, cos, sin = ctx.saved_tensors
        out = ctx.into.take(x_BSHC.shape)
        return *backward(grad_BSHC, x_BSHC, gain_C, ctx.eps, cos, sin, out), None, None, None, None
