"""The linear layer without bias, y = x·Wᵀ, and the three matrix products that it and other ops are made of.

    linear_forward       y  = x·Wᵀ
    linear_grad_input    dx = dy·W
    linear_grad_weight   dW = dyᵀ·x

On a GPU, and in float64, they are torch.mm. On a CPU they take what is fastest there:

- fp32: torch.mm (MKL), or oneDNN's product, which is as exact, and runs at twice MKL's rate on AMD's processors from
  Zen 5 on. `set_fp32_products` chooses, once per process: the two give different last bits. At equal rates, as on
  Zen 4, oneDNN loses: its results are copied, and each new shape is compiled and kept.
- bf16: torch.mm. A CPU without bf16 arithmetic multiplies bf16 at a fifth of its fp32 speed: there the operands are
  cast to fp32 and the result is rounded once. The product of two bf16 numbers is exact in fp32, and accelerators
  accumulate in fp32 too, so the meaning is the same.

Saved for backward by `linear`: x and W in their own dtype. There is no Triton version: torch's product is used there.

Shapes: ... any leading dimensions, N rows, I input width, O output width.
"""

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity_kernels.op import Op
from trinity_kernels.probe import probed

FP32_PRODUCTS = ("torch", "onednn")
"""Implementations of fp32 products on a CPU."""

ZEN_5 = 26
"""The family of AMD's processors with 512-bit arithmetic, as /proc/cpuinfo counts."""

_fp32_products = "torch"


def set_fp32_products(name: str) -> None:
    """Choose the implementation of fp32 products on the CPU for this process.

    Args:
        name: "torch", or "onednn".
    Raises:
        ValueError: an unknown name, or "onednn" where torch was built without it.
    """
    global _fp32_products
    if name not in FP32_PRODUCTS:
        raise ValueError(f"{name} is not known; use one of {', '.join(FP32_PRODUCTS)}")
    if name == "onednn" and not has_onednn():
        raise ValueError("this torch has no product of oneDNN; use torch")
    _fp32_products = name


def fp32_products() -> str:
    """The implementation of fp32 products in use."""
    return _fp32_products


def fastest_fp32_products() -> Literal["torch", "onednn"]:
    """The faster implementation on this machine: oneDNN where torch multiplies by MKL on AMD's Zen 5 or later.

    On the AMD processors measured MKL runs at the rate of 256-bit instructions, and from Zen 5 on those of 512 bits are
    twice as fast. By the family and not by a measurement, so that every start and every rank chooses the same.
    """
    vendor, family = _cpu()
    slow_mkl = vendor == "AuthenticAMD" and family >= ZEN_5 and torch.backends.mkl.is_available()
    return "onednn" if slow_mkl and has_onednn() else "torch"


@probed
def has_onednn() -> bool:
    """Whether oneDNN's product can be called: the op is private, so a later torch may not have it."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        x = torch.ones(2, 2)
        return torch.equal(_onednn(x, x), torch.full((2, 2), 2.0))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _cpu() -> tuple[str, int]:
    """The processor's vendor and family as Linux names them; "" and 0 where it does not."""
    try:
        with open("/proc/cpuinfo") as lines:
            fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    except OSError:
        return "", 0
    family = fields.get("cpu family", "")
    return fields.get("vendor_id", ""), int(family) if family.isdigit() else 0


@cache
def _cpu_has_bf16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def multiplies_in_fp32(x: Tensor) -> bool:
    """Whether matrix products of x are computed in fp32: x is bf16 on a CPU without bf16 arithmetic."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _cpu_has_bf16()


def matmul_operand(x: Tensor) -> Tensor:
    """x as the operand of a matrix product: cast to fp32 if `multiplies_in_fp32(x)`, otherwise x itself."""
    return x.float() if multiplies_in_fp32(x) else x


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left·right of two matrices, by the implementation that the module's docstring names; not differentiable.

    Args:
        left, right: [M, K] and [K, N], one floating-point dtype, any strides.
        out: [M, N], same dtype: where to write the result.
    Returns:
        [M, N], same dtype; accumulated in at least fp32.
    """
    if takes_onednn(left) and left.numel() and right.numel():
        result = _onednn(left, right.t())
    elif multiplies_in_fp32(left):
        result = left.float() @ right.float()
    else:
        return torch.mm(left, right, out=out)
    return result.to(left.dtype) if out is None else out.copy_(result)


def linear_forward(x_NI: Tensor, weight_OI: Tensor, out: Tensor | None = None) -> Tensor:
    """x·Wᵀ; not differentiable.

    Args:
        x_NI: [N, I], floating point, any strides.
        weight_OI: [O, I], same dtype, any strides.
        out: [N, O], same dtype: where to write the result.
    Returns:
        [N, O], same dtype; accumulated in at least fp32.
    """
    return product(x_NI, weight_OI.t(), out)


def linear_grad_input(grad_NO: Tensor, weight_OI: Tensor, out: Tensor | None = None) -> Tensor:
    """dy·W, [N, I]; as linear_forward."""
    return product(grad_NO, weight_OI, out)


def linear_grad_weight(grad_NO: Tensor, x_NI: Tensor, out: Tensor | None = None) -> Tensor:
    """dyᵀ·x, [O, I]; as linear_forward."""
    if out is None and takes_onednn(grad_NO):
        # computed as its transpose: oneDNN takes twice the time for a tall result
        return product(x_NI.t(), grad_NO).t()
    return product(grad_NO.t(), x_NI, out)


def takes_onednn(x: Tensor) -> bool:
    """Whether matrix products of x are computed by oneDNN: x is fp32 on a CPU, and oneDNN is chosen."""
    return _fp32_products == "onednn" and x.dtype == torch.float32 and x.device.type == "cpu"


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return linear_forward(x.reshape(-1, x.shape[-1]), weight_OI).view(*x.shape[:-1], len(weight_OI))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        grad_NO = grad.reshape(-1, len(weight_OI))
        grad_x = linear_grad_input(grad_NO, weight_OI).view(x.shape) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None
        return grad_x, linear_grad_weight(grad_NO, x.reshape(-1, x.shape[-1]))


def _linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x·Wᵀ without bias.

    Args:
        x: [..., I], floating point.
        weight_OI: [O, I], same dtype.
    Returns:
        [..., O], same dtype; accumulated in at least fp32.
    """
    if multiplies_in_fp32(x) or takes_onednn(x):
        return _Linear.apply(x, weight_OI)
    return F.linear(x, weight_OI)


linear = Op(_linear)
