"""Shared by the tests of Triton kernels: the device, and the bounds on the distance from float64.

With an NVIDIA GPU they run on it and are marked gpu; without one under Triton's interpreter, on the CPU. The root
conftest sets TRITON_INTERPRET before anything imports Triton.
"""

import numpy as np
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# fp32 products and sums stay below 1e-5; each rounding to 16 bits is off by half a unit in the last place (2⁻⁹ in bf16,
# 2⁻¹² in fp16), and a few tensors are rounded on the way
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def relative_error(got: Tensor, exact: Tensor) -> float:
    """‖got − exact‖ / ‖exact‖ in float64; where exact is 0, the norm of got. NaN anywhere gives NaN."""
    got, exact = got.detach().double().cpu(), exact.detach().double().cpu()
    assert got.shape == exact.shape, (got.shape, exact.shape)
    size = exact.norm()
    return ((got - exact).norm() / (size if size > 0 else 1.0)).item()


def assert_close(got: Tensor, exact: Tensor, bound: float) -> None:
    """relative_error within the bound; NaN fails."""
    error = relative_error(got, exact)
    assert error <= bound, f"{error:.2e} > {bound:.0e}"


def correct_bf16_in_the_interpreter() -> None:
    """Make bf16 behave as on a GPU: Triton's interpreter multiplies raw bits and rounds to bf16 towards zero.

    Operands of a product are cast to fp32, where the product of two bf16 numbers is exact; fp32 is rounded to the
    nearest bf16, ties to even; denormal bf16 numbers keep their value in fp32.
    """
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    multiply, convert = InterpreterBuilder.create_dot, interpreter._convert_float
    if hasattr(multiply, "casts_to_fp32"):
        return

    def as_fp32(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return multiply(self, as_fp32(a), as_fp32(b), *rest)

    def convert_float(values, source, target, rounding):
        if (source, target) == (tl.bfloat16, tl.float32):
            return values.astype(np.uint32) << 16
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding)
        bits = np.ascontiguousarray(values).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)

    create_dot.casts_to_fp32 = True
    InterpreterBuilder.create_dot, interpreter._convert_float = create_dot, convert_float
