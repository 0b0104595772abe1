"""The experts' kernels at the real models' sizes, for compiled.py: forward, backward, recompute, main gradients.

Shapes: T tokens, D width, E experts, F expert width, K active experts, R rows.
"""

from collections.abc import Callable
from functools import partial

import torch

from trinity_kernels import experts_triton, grouping_triton
from trinity_kernels.combine import Places

# d, expert width, experts, active
SIZES = {
    "nano": (1024, 256, 128, 8), "mini": (2048, 1024, 128, 8), "large": (3072, 3072, 256, 4), "smoke": (256, 96, 16, 4),
}  # fmt: skip


def layer(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Every launch of one layer, forward and backward, with new gradients and added to old ones."""
    (D, F, E, K), T = sizes, 4096
    R = T * K
    x_TD, s_TK = torch.empty(T, D, dtype=dtype), torch.empty(T, K)
    w1, w2 = torch.empty(E, 2, F, D, dtype=dtype), torch.empty(E, D, F, dtype=dtype)
    order_R, place_TK, ends_E = (torch.empty(shape, dtype=torch.int32) for shape in ((R,), (T, K), (E,)))
    grouping_triton.group_rows(torch.empty(T, K, dtype=torch.int64), E, R)
    for keep in (True, False):
        experts_triton.forward(x_TD, w1, w2, torch.empty(T, K, dtype=torch.int64), s_TK, R, keep, x_TD)
    experts_triton.combine_rows(x_TD, Places(torch.empty(T, 8, dtype=torch.int64), T), x_TD)
    kept = torch.empty(R, 2 * F, dtype=dtype), order_R, place_TK, ends_E
    experts_triton.backward(x_TD, x_TD, w1, w2, s_TK, kept)
    experts_triton.backward(x_TD, x_TD, w1, w2, s_TK, kept, into=(torch.empty(E, 2, F, D), torch.empty(E, D, F)))


CASES: dict[str, Callable[[], None]] = {
    f"{name} {str(dtype).removeprefix('torch.')}": partial(layer, sizes, dtype)
    for name, sizes in SIZES.items()
    for dtype in ((torch.bfloat16, torch.float32) if name == "smoke" else (torch.bfloat16,))
}
