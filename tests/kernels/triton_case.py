"""What tests of Triton kernels share: where they run, and how far from float64 they may be.

With an NVIDIA GPU they run on it and are marked gpu; without one under Triton's interpreter, on the CPU. The root
conftest sets TRITON_INTERPRET before anything imports Triton.
"""

import numpy as np
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# kernels.md: fp32 products and sums stay below 1e-5; a 16-bit number is half a unit in its last place off (2⁻⁹ in bf16,
# 2⁻¹² in fp16) in every tensor that is rounded on the way, of which there are a few.
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


def widen_bf16_products() -> None:
    """Mend the interpreter, which multiplies the raw bits of bf16: both operands are widened to fp32 first.

    The product of two bf16 numbers is exact in fp32, so this is what a tensor core computes.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    plain = InterpreterBuilder.create_dot
    if hasattr(plain, "widens"):
        return

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return plain(self, widened(a), widened(b), *rest)

    create_dot.widens = True
    InterpreterBuilder.create_dot = create_dot
