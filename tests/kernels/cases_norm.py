"""The memory-bound kernels at the real models' sizes, for compiled.py: norms, QK-norm, gate and SwiGLU."""

from collections.abc import Callable
from functools import partial

import torch

from trinity_kernels import gate_triton, norm_triton, qk_norm_triton, swiglu_triton

EPS = 1e-5
# width, query heads, key heads, head width, feed-forward width
SIZES = {
    "nano": (1024, 8, 2, 128, 3072), "mini": (2048, 32, 4, 128, 6144), "large": (3072, 48, 8, 128, 12288),
    "smoke": (256, 4, 2, 64, 96), "widest": (4096, 2, 1, 2048, 96),
}  # fmt: skip


def norms(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """RMSNorm alone, before a sum, and between two sublayers, forward and backward."""
    D, T = sizes[0], 32768
    x, gain, inverse = torch.empty(T, D, dtype=dtype), torch.empty(D), torch.empty(T)
    norm_triton.norm_forward(x, None, gain, EPS)
    norm_triton.norm_forward(x, x, gain, EPS)
    norm_triton.norm_backward(x, x, gain, inverse)
    norm_triton.add_norm_forward(x, x, gain, gain, EPS)
    norm_triton.add_norm_backward(x, x, x, x, gain, gain, inverse, inverse)


def attention(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Queries, keys and gate as parts of one projection, with RoPE and without."""
    _, H, G, C, _ = sizes
    B, S, gain = 8, 4096, torch.empty(C)
    q, k, _, gate = torch.empty(B, S, 2 * (H + G) * C, dtype=dtype).split((H * C, G * C, G * C, H * C), dim=-1)
    angles = torch.empty(1, S, 1, C // 2)
    for x, heads in ((q, H), (k, G)):
        x = x.unflatten(-1, (heads, C))
        for cos in (angles, None):
            qk_norm_triton.forward(x, gain, EPS, cos, cos)
            qk_norm_triton.backward(x.contiguous(), x, gain, EPS, cos, cos)
            qk_norm_triton.backward(x.contiguous(), x, gain, EPS, cos, cos, x)  # into a part of the gradient
    mixed = torch.empty(B * S, H * C, dtype=dtype)
    gate_triton.forward(mixed, gate.flatten(0, 1))
    gate_triton.backward(mixed, mixed, gate.flatten(0, 1))
    gate_triton.backward(mixed, mixed, gate.flatten(0, 1), gate.flatten(0, 1))


def feed_forward(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """SwiGLU of the dense FFN."""
    pre = torch.empty(32768, 2 * sizes[-1], dtype=dtype)
    swiglu_triton.forward(pre)
    swiglu_triton.backward(torch.empty(32768, sizes[-1], dtype=dtype), pre)


CASES: dict[str, Callable[[], None]] = {
    f"{part.__name__} {name} {str(dtype).removeprefix('torch.')}": partial(part, sizes, dtype)
    for name, sizes in SIZES.items()
    for dtype in ((torch.bfloat16, torch.float32) if name in ("smoke", "widest") else (torch.bfloat16,))
    for part in (norms, attention, feed_forward)
}
