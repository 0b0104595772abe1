"""The sigmoid gate on attention's output (eq. 14): y = x·σ(g), computed in fp32 and rounded once.

Saved for backward: x and g; σ(g) is computed again. dx = dy·σ, dg = dy·x·σ·(1 − σ).
Triton (gate_triton.py): one kernel forward, one backward; rows of x and g may be strided.

Shapes: ... any leading dimensions, N gated width.
"""

import torch
from torch import Tensor

from trinity_kernels.norm import wide
from trinity_kernels.op import Op
from trinity_kernels.split import GradientSlice


class _SigmoidGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, into: GradientSlice | None) -> Tensor:
        ctx.save_for_backward(x, gate)
        ctx.into = into
        return torch.sigmoid(wide(gate)).mul_(wide(x)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gate = ctx.saved_tensors
        sigmoid, grad_wide = torch.sigmoid(wide(gate)), wide(grad)
        product = grad_wide * wide(x)
        out = None if ctx.into is None else ctx.into.take(gate.shape)
        direct = out is not None and out.dtype == product.dtype
        grad_gate = torch.ops.aten.sigmoid_backward.grad_input(product, sigmoid, grad_input=out if direct else product)
        if not direct:
            grad_gate = grad_gate.to(gate.dtype) if out is None else out.copy_(grad_gate)
        return sigmoid.mul_(grad_wide).to(x.dtype), grad_gate, None


def _sigmoid_gate(x: Tensor, gate: Tensor, into: GradientSlice | None = None) -> Tensor:
    """x·σ(gate), elementwise.

    Args:
        x: [..., N], floating point.
        gate: the same shape and dtype; either may be a view with gaps between its rows.
        into: where the gate's gradient belongs, if the gate is a part of split_projection.
    Returns:
        [..., N], x's dtype, contiguous.
    """
    return _SigmoidGate.apply(x, gate, into)


def refuses(x: Tensor, *_: object, **__: object) -> str | None:
    """Why the elementwise Triton kernels do not support x (float64), or None."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes 16-bit and 32-bit numbers, not {x.dtype}"
    return None


sigmoid_gate = Op(_sigmoid_gate, "trinity_kernels.gate_triton:sigmoid_gate", refuses)
