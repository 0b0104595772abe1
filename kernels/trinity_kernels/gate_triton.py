"""The sigmoid gate in Triton: one kernel forward, one backward, each reading and writing every number once.

Tiles span several rows and up to 1024 columns. Rows may be strided, as those of the gate are in the fused projection.

Shapes: T rows (all leading dimensions), N width.
"""

import torch
from torch import Tensor

from trinity_kernels.custom_op import custom_op
from trinity_kernels.language import cdiv, next_power_of_2, tl, triton
from trinity_kernels.split import GradientSlice


def tile(width: int) -> dict[str, int]:
    """2048 numbers for 4 warps: in bf16, two 16-byte reads of each operand per thread."""
    columns = min(1024, next_power_of_2(width))
    return {"BLOCK_T": max(1, 2048 // columns), "BLOCK_N": columns, "num_warps": 4}


def grid(rows: int, width: int) -> tuple[int, int]:
    """Number of tiles along rows and along columns."""
    blocks = tile(width)
    return cdiv(rows, blocks["BLOCK_T"]), cdiv(width, blocks["BLOCK_N"])


def sigmoid_gate(x: Tensor, gate: Tensor, into: GradientSlice | None = None) -> Tensor:
    """See trinity_kernels.sigmoid_gate."""
    x_TN, gate_TN = x.reshape(-1, x.shape[-1]), gate.reshape(-1, x.shape[-1])
    out = forward_op(x_TN, gate_TN) if into is None else _SigmoidGate.apply(x_TN, gate_TN, into)
    return out.view(x.shape)


def forward(x_TN: Tensor, gate_TN: Tensor) -> Tensor:
    """x·σ(gate), [T, N] contiguous."""
    x_TN, gate_TN = _contiguous_rows(x_TN), _contiguous_rows(gate_TN)
    (T, N), out = x_TN.shape, x_TN.new_empty(x_TN.shape)
    if out.numel():
        gate_kernel[grid(T, N)](x_TN, gate_TN, out, T, N, x_TN.stride(0), gate_TN.stride(0), **tile(N))
    return out


def backward(grad_TN: Tensor, x_TN: Tensor, gate_TN: Tensor, into_TN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of x, [T, N] contiguous, and of gate: in `into_TN`, whose rows may be strided, or contiguous."""
    grad_TN, x_TN, gate_TN = (_contiguous_rows(part) for part in (grad_TN, x_TN, gate_TN))
    (T, N), grad_x = x_TN.shape, x_TN.new_empty(x_TN.shape)
    grad_gate = x_TN.new_empty(x_TN.shape) if into_TN is None else into_TN
    if grad_x.numel():
        gate_backward_kernel[grid(T, N)](
            grad_TN, x_TN, gate_TN, grad_x, grad_gate, T, N,
            grad_TN.stride(0), x_TN.stride(0), gate_TN.stride(0), grad_gate.stride(0), **tile(N),
        )  # fmt: skip
    return grad_x, grad_gate


def _contiguous_rows(x_TN: Tensor) -> Tensor:
    return x_TN if x_TN.stride(-1) == 1 else x_TN.contiguous()


@triton.jit
def gate_kernel(
    x, gate, out, T, N, x_step, gate_step, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """One tile of x·σ(gate)."""
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = (row < T) & (column < N)
    value = tl.load(x + row * x_step + column, mask=inside, other=0.0).to(tl.float32)
    opening = tl.sigmoid(tl.load(gate + row * gate_step + column, mask=inside, other=0.0).to(tl.float32))
    tl.store(out + row * N + column, (value * opening).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_backward_kernel(
    grad, x, gate, grad_x, grad_gate, T, N, grad_step, x_step, gate_step, grad_gate_step,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of both gradients."""
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = (row < T) & (column < N)
    dy = tl.load(grad + row * grad_step + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + row * x_step + column, mask=inside, other=0.0).to(tl.float32)
    opening = tl.sigmoid(tl.load(gate + row * gate_step + column, mask=inside, other=0.0).to(tl.float32))
    dx = dy * opening
    tl.store(grad_x + row * N + column, dx.to(grad_x.dtype.element_ty), mask=inside)
    dg = dx * value * (1 - opening)
    tl.store(grad_gate + row * grad_gate_step + column, dg.to(grad_gate.dtype.element_ty), mask=inside)


@custom_op("trinity::sigmoid_gate_triton")
def forward_op(x_TN: Tensor, gate_TN: Tensor) -> Tensor:
    """`forward` as a custom op, known to autograd, torch.compile and recompute."""
    return forward(x_TN, gate_TN)


@forward_op.register_fake
def _(x_TN: Tensor, gate_TN: Tensor) -> Tensor:
    return x_TN.new_empty(x_TN.shape)


@custom_op("trinity::sigmoid_gate_triton_backward")
def backward_op(grad_TN: Tensor, x_TN: Tensor, gate_TN: Tensor) -> tuple[Tensor, Tensor]:
    """`backward` as a custom op."""
    return backward(grad_TN, x_TN, gate_TN)


@backward_op.register_fake
def _(grad_TN: Tensor, x_TN: Tensor, gate_TN: Tensor) -> tuple[Tensor, Tensor]:
    return x_TN.new_empty(x_TN.shape), x_TN.new_empty(x_TN.shape)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad_TN: Tensor) -> tuple[Tensor, Tensor]:
    return backward_op(grad_TN, *ctx.saved_tensors)


forward_op.register_autograd(_differentiate, setup_context=_save)


class _SigmoidGate(torch.autograd.Function):
    """The op in eager mode, with a gradient of the gate that is written into a slice; a custom op cannot alias one."""

    @staticmethod
    def forward(ctx, x_TN: Tensor, gate_TN: Tensor, into: GradientSlice) -> Tensor:
        ctx.save_for_backward(x_TN, gate_TN)
        ctx.into = into
        return forward(x_TN, gate_TN)

    @staticmethod
    def backward(ctx, grad_TN: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TN, gate_TN = ctx.saved_tensors
        return *backward(grad_TN, x_TN, gate_TN, ctx.into.take(gate_TN.shape)), None
