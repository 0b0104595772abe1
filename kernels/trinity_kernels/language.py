"""What every file of Triton kernels imports: the language, host descriptors, and what the kernels share.

Imported only where a Triton op runs. The kernels keep to what Triton 3.6 to 3.9 have in common.
"""

import os

# a·b + c in one rounding, as always on NVIDIA GPUs; Triton 3.10 would do without unless told
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["TensorDescriptor", "cdiv", "tl", "triton"]


def cdiv(n: int, by: int) -> int:
    """⌈n/by⌉."""
    return -(-n // by)
