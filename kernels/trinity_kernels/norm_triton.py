"""RMSNorm in Triton, alone and fused with the residual stream: one pass over memory forward, one backward.

A program processes whole rows, several at a time, and advances by the stride of the grid, so it reads the gains once
and sums their gradients in registers. Each program writes its sum to a row of its own, [programs, D], and torch adds
the rows: no atomics, the same bits every time. The number of programs depends only on the width and the number of rows.
While one row is computed, the next ones are read (num_stages of tl.range).

Saved for backward: the input of each norm, and 1/rms per row in fp32.

Shapes: T rows (all leading dimensions), D width, P programs.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from trinity_kernels.custom_op import custom_op
from trinity_kernels.language import cdiv, next_power_of_2, tl, triton

MULTIPROCESSORS = 132
"""Of an H100 or H200. Other GPUs get a less even grid, nothing worse."""


class Plan(NamedTuple):
    """How a kernel covers [T, D]: rows and columns of a tile, warps, stages of the row loop, and most programs."""

    rows: int
    columns: int
    warps: int
    stages: int
    programs: int

    def options(self) -> dict[str, int]:
        """The kernels' launch options."""
        return {"BLOCK_T": self.rows, "BLOCK_D": self.columns, "STAGES": self.stages, "num_warps": self.warps}

    def grid(self, tokens: int) -> tuple[int]:
        """One program per tile, at most `programs`."""
        return (min(self.programs, cdiv(tokens, self.rows)),)


@cache
def forward_plan(width: int) -> Plan:
    """8 numbers of a row per thread, which are 16 bytes in bf16; 32 warps per multiprocessor.

    Three rows of prefetch keep 48 kB in flight per multiprocessor for Nano's rms_norm and 36 kB for Large's; a
    bandwidth of 4.3 TB/s at a latency of one microsecond needs 33 kB.
    """
    columns = next_power_of_2(width)
    rows = max(1, 1024 // columns)
    warps = min(16, rows * columns // 256)
    return Plan(rows, columns, warps, 4, MULTIPROCESSORS * 32 // warps)


@cache
def backward_plan(width: int, element_bytes: int) -> Plan:
    """The same tiles, fewer programs: each also holds sums in registers, so 16 warps fit, with ≥ 32 kB in flight.

    One row ahead is enough where a row of both inputs has 32 kB (fp32, width 4096): with two, Triton 3.6 spills there.
    """
    plan = forward_plan(width)
    stages = 2 if 2 * width * element_bytes >= 32 * 1024 else 3
    return plan._replace(stages=stages, programs=MULTIPROCESSORS * 16 // plan.warps)


def rms_norm(x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """See trinity_kernels.rms_norm."""
    return norm_op(x.contiguous(), None, gain_D, eps)[0]


def norm_add(y: Tensor, x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """See trinity_kernels.norm_add."""
    return norm_op(y.contiguous(), x.contiguous(), gain_D, eps)[0]


def add_norm(y: Tensor, x: Tensor, post_gain_D: Tensor, gain_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See trinity_kernels.add_norm."""
    return add_norm_op(y.contiguous(), x.contiguous(), post_gain_D, gain_D, eps)[:2]


def norm_forward(x: Tensor, added: Tensor | None, gain_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm(x), plus `added` if given, [..., D]; and 1/rms [T]. All tensors are contiguous."""
    D = x.shape[-1]
    T = x.numel() // D
    out, inverse_T = torch.empty_like(x), x.new_empty(T, dtype=torch.float32)
    if T:
        plan = forward_plan(D)
        norm_kernel[plan.grid(T)](
            x, x if added is None else added, gain_D, out, inverse_T, T, D, eps, ADD=added is not None, **plan.options()
        )
    return out, inverse_T


def norm_backward(grad: Tensor, x: Tensor, gain_D: Tensor, inverse_T: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and the gain."""
    T, D = len(inverse_T), x.shape[-1]
    grad_x, plan = torch.empty_like(x), backward_plan(D, x.element_size())
    sums_PD = gain_D.new_empty(*plan.grid(T), D, dtype=torch.float32)
    if T:
        norm_backward_kernel[plan.grid(T)](grad, x, gain_D, inverse_T, grad_x, sums_PD, T, D, **plan.options())
    return grad_x, sums_PD.sum(dim=0).to(gain_D.dtype)


def add_norm_forward(
    y: Tensor, x: Tensor, post_gain_D: Tensor, gain_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r = x + RMSNorm(y) and u = RMSNorm(r), [..., D]; 1/rms of y and of r, [T]. All tensors are contiguous."""
    D = y.shape[-1]
    T = y.numel() // D
    r, u = torch.empty_like(x), torch.empty_like(x)
    inverse_y, inverse_r = (y.new_empty(T, dtype=torch.float32) for _ in range(2))
    if T:
        plan = forward_plan(D)
        add_norm_kernel[plan.grid(T)](
            y, x, post_gain_D, gain_D, r, u, inverse_y, inverse_r, T, D, eps, **plan.options()
        )
    return r, u, inverse_y, inverse_r


def add_norm_backward(
    grad_r: Tensor, grad_u: Tensor, y: Tensor, r: Tensor, post_gain_D: Tensor, gain_D: Tensor,
    inverse_y: Tensor, inverse_r: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of y, x, post_gain and gain."""
    T, D = len(inverse_y), y.shape[-1]
    grad_y, grad_x, plan = torch.empty_like(y), torch.empty_like(y), backward_plan(D, y.element_size())
    post_sums_PD, sums_PD = (gain_D.new_empty(*plan.grid(T), D, dtype=torch.float32) for _ in range(2))
    if T:
        add_norm_backward_kernel[plan.grid(T)](
            grad_r, grad_u, y, r, post_gain_D, gain_D, inverse_y, inverse_r, grad_y, grad_x, post_sums_PD, sums_PD,
            T, D, **plan.options(),
        )  # fmt: skip
    return grad_y, grad_x, post_sums_PD.sum(dim=0).to(post_gain_D.dtype), sums_PD.sum(dim=0).to(gain_D.dtype)


@triton.jit
def norm_kernel(
    x, added, gain, out, inverses, T, D, eps,
    ADD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of RMSNorm(x), with ADD of added + RMSNorm(x)."""
    column = tl.arange(0, BLOCK_D)[None, :]
    g = tl.load(gain + column, mask=column < D, other=0.0).to(tl.float32)
    for first in tl.range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T, num_stages=STAGES):
        row = first + tl.arange(0, BLOCK_T)[:, None]
        inside = (row < T) & (column < D)
        place = row.to(tl.int64) * D + column
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        inverse = _inverse_rms(value, D, eps)
        value = value * inverse * g
        if ADD:
            value += tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
        tl.store(inverses + row, inverse, mask=row < T)


@triton.jit
def norm_backward_kernel(
    grad, x, gain, inverses, grad_x, sums, T, D,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of the gradient of x, and this program's share of the gain's gradient."""
    column = tl.arange(0, BLOCK_D)[None, :]
    g = tl.load(gain + column, mask=column < D, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in tl.range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T, num_stages=STAGES):
        row = first + tl.arange(0, BLOCK_T)[:, None]
        inside = (row < T) & (column < D)
        place = row.to(tl.int64) * D + column
        dy = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverses + row, mask=row < T, other=0.0)
        unit = value * inverse
        total += dy * unit
        dx = _norm_gradient(dy, unit, inverse, g, D)
        tl.store(grad_x + place, dx.to(grad_x.dtype.element_ty), mask=inside)
    place = sums + tl.program_id(0) * D + column
    tl.store(place, tl.sum(total, axis=0, keep_dims=True), mask=column < D)


@triton.jit
def add_norm_kernel(
    y, x, post_gain, gain, sums, normed, inverses_y, inverses_r, T, D, eps,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of r = x + RMSNorm(y), and of RMSNorm(r) computed from the rounded r."""
    column = tl.arange(0, BLOCK_D)[None, :]
    p = tl.load(post_gain + column, mask=column < D, other=0.0).to(tl.float32)
    g = tl.load(gain + column, mask=column < D, other=0.0).to(tl.float32)
    for first in tl.range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T, num_stages=STAGES):
        row = first + tl.arange(0, BLOCK_T)[:, None]
        inside = (row < T) & (column < D)
        place = row.to(tl.int64) * D + column
        value = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
        inverse = _inverse_rms(value, D, eps)
        r = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) + value * inverse * p
        rounded = r.to(sums.dtype.element_ty)
        tl.store(sums + place, rounded, mask=inside)
        tl.store(inverses_y + row, inverse, mask=row < T)
        r = rounded.to(tl.float32)
        inverse = _inverse_rms(r, D, eps)
        tl.store(normed + place, (r * inverse * g).to(normed.dtype.element_ty), mask=inside)
        tl.store(inverses_r + row, inverse, mask=row < T)


@triton.jit
def add_norm_backward_kernel(
    grad_r, grad_u, y, r, post_gain, gain, inverses_y, inverses_r, grad_y, grad_x, post_sums, sums, T, D,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of the gradients of y and x, and this program's share of both gains' gradients."""
    column = tl.arange(0, BLOCK_D)[None, :]
    p = tl.load(post_gain + column, mask=column < D, other=0.0).to(tl.float32)
    g = tl.load(gain + column, mask=column < D, other=0.0).to(tl.float32)
    post_total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in tl.range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T, num_stages=STAGES):
        row = first + tl.arange(0, BLOCK_T)[:, None]
        inside = (row < T) & (column < D)
        place = row.to(tl.int64) * D + column
        du = tl.load(grad_u + place, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverses_r + row, mask=row < T, other=0.0)
        unit = tl.load(r + place, mask=inside, other=0.0).to(tl.float32) * inverse
        total += du * unit
        dr = tl.load(grad_r + place, mask=inside, other=0.0).to(tl.float32) + _norm_gradient(du, unit, inverse, g, D)
        tl.store(grad_x + place, dr.to(grad_x.dtype.element_ty), mask=inside)
        inverse = tl.load(inverses_y + row, mask=row < T, other=0.0)
        unit = tl.load(y + place, mask=inside, other=0.0).to(tl.float32) * inverse
        post_total += dr * unit
        dy = _norm_gradient(dr, unit, inverse, p, D)
        tl.store(grad_y + place, dy.to(grad_y.dtype.element_ty), mask=inside)
    place = tl.program_id(0) * D + column
    tl.store(post_sums + place, tl.sum(post_total, axis=0, keep_dims=True), mask=column < D)
    tl.store(sums + place, tl.sum(total, axis=0, keep_dims=True), mask=column < D)


@triton.jit
def _inverse_rms(value, D, eps):
    """1/√(mean(x²) + ε) of each row; columns past the width must be 0."""
    return tl.rsqrt(tl.sum(value * value, axis=1, keep_dims=True) / D + eps)


@triton.jit
def _norm_gradient(dy, unit, inverse, gain, D):
    """(g·dy − x̂·mean(g·dy·x̂))/rms."""
    scaled = dy * gain
    return (scaled - unit * (tl.sum(scaled * unit, axis=1, keep_dims=True) / D)) * inverse


@custom_op("trinity::norm_triton")
def norm_op(x: Tensor, added: Tensor | None, gain_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`norm_forward` as a custom op, known to autograd, torch.compile and recompute."""
    return norm_forward(x, added, gain_D, eps)


@norm_op.register_fake
def _(x: Tensor, added: Tensor | None, gain_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@custom_op("trinity::norm_triton_backward")
def norm_backward_op(grad: Tensor, x: Tensor, gain_D: Tensor, inverse_T: Tensor) -> tuple[Tensor, Tensor]:
    """`norm_backward` as a custom op."""
    return norm_backward(grad, x, gain_D, inverse_T)


@norm_backward_op.register_fake
def _(grad: Tensor, x: Tensor, gain_D: Tensor, inverse_T: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(gain_D)


@custom_op("trinity::add_norm_triton")
def add_norm_op(
    y: Tensor, x: Tensor, post_gain_D: Tensor, gain_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`add_norm_forward` as a custom op."""
    return add_norm_forward(y, x, post_gain_D, gain_D, eps)


@add_norm_op.register_fake
def _(y: Tensor, x: Tensor, post_gain_D: Tensor, gain_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inverse_y, inverse_r = (y.new_empty(y.numel() // y.shape[-1], dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), torch.empty_like(x), inverse_y, inverse_r


@custom_op("trinity::add_norm_triton_backward")
def add_norm_backward_op(
    grad_r: Tensor, grad_u: Tensor, y: Tensor, r: Tensor, post_gain_D: Tensor, gain_D: Tensor,
    inverse_y: Tensor, inverse_r: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`add_norm_backward` as a custom op."""
    return add_norm_backward(grad_r, grad_u, y, r, post_gain_D, gain_D, inverse_y, inverse_r)


@add_norm_backward_op.register_fake
def _(
    grad_r: Tensor, grad_u: Tensor, y: Tensor, r: Tensor, post_gain_D: Tensor, gain_D: Tensor,
    inverse_y: Tensor, inverse_r: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(y), torch.empty_like(y), torch.empty_like(post_gain_D), torch.empty_like(gain_D)


def _save_norm(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, added, gain_D, _ = inputs
    ctx.added = added is not None
    ctx.save_for_backward(x, gain_D, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate_norm(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_x, grad_gain = norm_backward_op(grad.contiguous(), *ctx.saved_tensors)
    return grad_x, grad if ctx.added else None, grad_gain, None


def _save_add_norm(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    y, _, post_gain_D, gain_D, _ = inputs
    r, _, inverse_y, inverse_r = output
    ctx.save_for_backward(y, r, post_gain_D, gain_D, inverse_y, inverse_r)
    ctx.mark_non_differentiable(inverse_y, inverse_r)


def _differentiate_add_norm(
    ctx, grad_r: Tensor | None, grad_u: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once, because checkpoint refuses a second reading
    grads = (torch.zeros_like(saved[0]) if grad is None else grad.contiguous() for grad in (grad_r, grad_u))
    return *add_norm_backward_op(*grads, *saved), None


norm_op.register_autograd(_differentiate_norm, setup_context=_save_norm)
add_norm_op.register_autograd(_differentiate_add_norm, setup_context=_save_add_norm)
