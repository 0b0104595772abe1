"""Imports that all files of Triton kernels share: the Triton language, host-side tensor descriptors, and two roundings.

Imported only where a Triton op runs. The kernels use only what Triton 3.6 to 3.9 have in common.
"""

import os
from functools import cache

# a·b + c with one rounding, as NVIDIA GPUs do by default; Triton 3.10 turns that off unless this is set
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["TensorDescriptor", "cdiv", "next_power_of_2", "tl", "triton"]


def cdiv(n: int, by: int) -> int:
    """⌈n/by⌉."""
    return -(-n // by)


@cache
def next_power_of_2(n: int) -> int:
    """The smallest power of two ≥ n; cached, because Triton's own takes 2 µs, and launchers call it at every launch."""
    power: int = triton.next_power_of_2(n)
    return power
