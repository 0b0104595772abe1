"""Grouping and tables of tiles at the real models' sizes, for compiled.py.

Shapes: T tokens, K active experts.
"""

from collections.abc import Callable
from functools import partial

import torch

from trinity_kernels import grouping_triton


def group(experts: int, active: int, tokens: int) -> None:
    """Rows of all tokens' choices, and tables for every height of a tile."""
    indices_TK = torch.empty(tokens, active, dtype=torch.int64)
    grouping_triton.group_rows(indices_TK, experts, tokens * active)
    for block in (64, 128):
        grouping_triton.tile_table(torch.empty(experts, dtype=torch.int32), tokens * active, block)


CASES: dict[str, Callable[[], None]] = {
    "nano and mini": partial(group, 128, 8, 32768), "large": partial(group, 256, 4, 32768),
    "smoke": partial(group, 16, 4, 4097), "one": partial(group, 1, 1, 1),
}  # fmt: skip
