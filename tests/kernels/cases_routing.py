"""Routing at the real models' sizes, for compiled.py.

Shapes: T tokens, E experts, K active experts.
"""

from collections.abc import Callable
from functools import partial

import torch

from trinity_kernels import routing_triton


def router(experts: int, active: int) -> None:
    """Choice, gates and their gradient for 32,768 tokens."""
    scores_TE = torch.empty(32768, experts)
    indices_TK = torch.empty(32768, active, dtype=torch.int64)
    routing_triton.launch_route(scores_TE, torch.empty(experts), active)
    routing_triton.launch_gates(scores_TE, indices_TK, 2.0)
    routing_triton.launch_gates(scores_TE, indices_TK, 2.0, torch.empty(32768, active))


CASES: dict[str, Callable[[], None]] = {
    "nano and mini": partial(router, 128, 8), "large": partial(router, 256, 4), "smoke": partial(router, 16, 4),
}  # fmt: skip
