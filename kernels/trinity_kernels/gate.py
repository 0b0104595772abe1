"""The sigmoid gate on attention's output (eq. 14): y = x·σ(g), computed in fp32 and rounded once.

Saved for backward: x and g; σ(g) is computed again. dx = dy·σ, dg = dy·x·σ·(1 − σ).
Triton (gate_triton.py): one kernel forward, one backward; rows of x and g may be strided.

Shapes: ... any leading dimensions, N gated width.
"""

import torch
from torch import Tensor

from trinity_kernels.norm import wide
from trinity_kernels.op import Op


class _SigmoidGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        return torch.sigmoid(wide(gate)).mul_(wide(x)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, gate = ctx.saved_tensors
        sigmoid, grad_wide = torch.sigmoid(wide(gate)), wide(grad)
        product = grad_wide * wide(x)
        grad_gate = torch.ops.aten.sigmoid_backward.grad_input(product, sigmoid, grad_input=product)
        return sigmoid.mul_(grad_wide).to(x.dtype), grad_gate.to(gate.dtype)


def _sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """x·σ(gate), elementwise.

    Args:
        x: [..., N], floating point.
        gate: the same shape and dtype; either may be a view with gaps between its rows.
    Returns:
        [..., N], x's dtype, contiguous.
    """
    return _SigmoidGate.apply(x, gate)


def refuses(x: Tensor, *_: object, **__: object) -> str | None:
    """Why the elementwise Triton kernels do not support x (float64), or None."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes 16-bit and 32-bit numbers, not {x.dtype}"
    return None


sigmoid_gate = Op(_sigmoid_gate, "trinity_kernels.gate_triton:sigmoid_gate", refuses)
