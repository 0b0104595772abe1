"""SwiGLU in Triton: one kernel forward, one backward, each reading and writing every number once.

Gate and up are read side by side from the projection's output, and their gradients are written side by side: no copy
splits the input, and backward does not concatenate.

Shapes: T rows (all leading dimensions), F width of the result.
"""

import torch
from torch import Tensor

from trinity_kernels.custom_op import custom_op
from trinity_kernels.gate_triton import grid, tile
from trinity_kernels.language import tl, triton


def swiglu(gate_up: Tensor) -> Tensor:
    """See trinity_kernels.swiglu."""
    return forward_op(gate_up.contiguous())


def forward(gate_up: Tensor) -> Tensor:
    """silu(gate)·up, [..., F]."""
    F = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], F)
    if out.numel():
        T = out.numel() // F
        swiglu_kernel[grid(T, F)](gate_up, out, T, F, **tile(F))
    return out


def backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradients of gate and up side by side, [..., 2F]."""
    F, out = grad.shape[-1], torch.empty_like(gate_up)
    if out.numel():
        T = grad.numel() // F
        swiglu_backward_kernel[grid(T, F)](grad, gate_up, out, T, F, **tile(F))
    return out


@triton.jit
def swiglu_kernel(gate_up, out, T, F, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """One tile of silu(gate)·up."""
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = (row < T) & (column < F)
    place = gate_up + row * (2 * F) + column
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + F, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * F + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(grad, gate_up, out, T, F, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """One tile of both gradients."""
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = (row < T) & (column < F)
    place = row * (2 * F) + column
    dy = tl.load(grad + row * F + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + place + F, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    # silu'(g) = σ(g)·(1 + g·(1 − σ(g))) = σ + silu·(1 − σ)
    grad_gate = dy * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(out + place, grad_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(out + place + F, (dy * silu).to(out.dtype.element_ty), mask=inside)


@custom_op("trinity::swiglu_triton")
def forward_op(gate_up: Tensor) -> Tensor:
    """`forward` as a custom op, known to autograd, torch.compile and recompute."""
    return forward(gate_up)


@forward_op.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@custom_op("trinity::swiglu_triton_backward")
def backward_op(grad: Tensor, gate_up: Tensor) -> Tensor:
    """`backward` as a custom op."""
    return backward(grad, gate_up)


@backward_op.register_fake
def _(grad: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty_like(gate_up)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad: Tensor) -> Tensor:
    return backward_op(grad.contiguous(), *ctx.saved_tensors)


forward_op.register_autograd(_differentiate, setup_context=_save)
