"""Imports that all files of Triton kernels share: the Triton language, host-side tensor descriptors, and cdiv.

Imported only where a Triton op runs. The kernels use only what Triton 3.6 to 3.9 have in common.
"""

import os

# a·b + c with one rounding, as NVIDIA GPUs do by default; Triton 3.10 turns that off unless this is set
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["TensorDescriptor", "cdiv", "tl", "triton"]


def cdiv(n: int, by: int) -> int:
    """⌈n/by⌉."""
    return -(-n // by)
