"""Routing at the real models' sizes, for compiled.py.

Shapes: T tokens, B rows, D width, E experts, K active experts.
"""

from collections.abc import Callable
from functools import partial

import torch

from trinity_kernels import router_scores_triton, routing_triton

T, B = 32768, 8


def router(width: int, experts: int, active: int) -> None:
    """Scores, choice, gates and statistics of 32,768 tokens, and every gradient."""
    parts = router_scores_triton.launch_split(torch.empty(experts, width))
    scores_TE = router_scores_triton.launch_scores(torch.empty(T, width, dtype=torch.bfloat16), parts)
    router_scores_triton.launch_split(scores_TE, scores_TE)
    indices_TK = torch.empty(T, active, dtype=torch.int64)
    grad_TK, grad_B = torch.empty(T, active), torch.empty(B)
    for padding_T in (None, torch.empty(T, dtype=torch.bool)):
        padded = padding_T is not None
        routing_triton.launch_route(scores_TE, torch.empty(experts), active, padding_T)
        for with_sequence_loss in (False, True):
            _, _, load_BE, _ = routing_triton.launch_weigh(scores_TE, indices_TK, 2.0, B, with_sequence_loss, padded)
            losses = grad_B if with_sequence_loss else None
            routing_triton.launch_weigh_backward(grad_TK, losses, scores_TE, indices_TK, load_BE, 2.0, padded)
        routing_triton.launch_weigh_backward(None, grad_B, scores_TE, indices_TK, load_BE, 2.0, padded)
        counts_BE = torch.empty(B, experts, dtype=torch.int64)
        routing_triton.launch_weigh(scores_TE, indices_TK, 2.0, B, True, padded, counts_BE)


CASES: dict[str, Callable[[], None]] = {
    "nano": partial(router, 1024, 128, 8),
    "mini": partial(router, 2048, 128, 8),
    "large": partial(router, 3072, 256, 4),
    "smoke": partial(router, 256, 16, 4),
    "most experts": partial(router, 1024, 512, 8),
}
