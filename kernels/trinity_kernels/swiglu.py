"""SwiGLU (Shazeer, arXiv 2002.05202): y = silu(gate) ∘ up of [gate | up] side by side, in fp32, rounded once.

Saved for backward: [gate | up], not silu(gate). With σ = σ(gate), dup = dy·gate·σ and
dgate = dy·up·(σ + gate·σ·(1 − σ)), written side by side like the input.
Triton (swiglu_triton.py): one kernel forward, one backward; gate and up are not split into tensors of their own.

Shapes: ... any leading dimensions, F width of the result; N rows, H = 2F.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity_kernels.gate import refuses
from trinity_kernels.norm import wide
from trinity_kernels.op import Op


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(wide(gate)).mul_(wide(up)).to(gate_up.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = wide(gate_up).chunk(2, dim=-1)
        out = torch.empty(gate_up.shape, dtype=gate.dtype, device=gate.device)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        grad_wide = wide(grad)
        product = grad_wide * up
        torch.ops.aten.silu_backward.grad_input(product, gate, grad_input=grad_gate)
        torch.mul(torch.ops.aten.silu.out(gate, out=product), grad_wide, out=grad_up)
        return out.to(gate_up.dtype)


def weighted_swiglu_backward(grad_NF: Tensor, pre_NH: Tensor, score_N1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of y = s·A, A = silu(gate)∘up, in torch, for the routed experts; overwrites grad_NF.

    Args:
        grad_NF: dy, fp32 or float64.
        pre_NH: [gate | up], any floating-point dtype.
        score_N1: s, in dy's dtype.
    Returns:
        y [N, F], the gradient of [gate | up] [N, 2F] and ds = rowsum(dy∘A) [N], in dy's dtype.
    """
    gate_NF, up_NF = wide(pre_NH).chunk(2, dim=1)
    grad_pre_NH = grad_NF.new_empty(pre_NH.shape)
    grad_gate_NF, grad_up_NF = grad_pre_NH.chunk(2, dim=1)
    silu_NF = F.silu(gate_NF)
    act_NF = silu_NF * up_NF
    grad_s_N = (grad_NF * act_NF).sum(dim=1)
    grad_act_NF = grad_NF.mul_(score_N1)
    torch.mul(grad_act_NF, silu_NF, out=grad_up_NF)
    torch.ops.aten.silu_backward.grad_input(grad_act_NF.mul_(up_NF), gate_NF, grad_input=grad_gate_NF)
    return act_NF.mul_(score_N1), grad_pre_NH, grad_s_N


def _swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate)·up.

    Args:
        gate_up: [..., 2F], floating point: gate first, then up.
    Returns:
        [..., F], same dtype, contiguous.
    """
    return _SwiGLU.apply(gate_up)


swiglu = Op(_swiglu, "trinity_kernels.swiglu_triton:swiglu", refuses)
