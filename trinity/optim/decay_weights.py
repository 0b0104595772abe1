"""Weights of a run's checkpoints whose average stands for a decay of the learning rate (WSM, arXiv 2507.17634).

A run at a constant rate moves by updates u_1 … u_k between the checkpoints n, n+1, …, n+k. Had update j been scaled by
w_j, with 1 ≥ w_1 ≥ … ≥ w_k ≥ 0, as a decay does, the result would be, updates unchanged,

    θ_n + Σ_j w_j u_j = Σ_j c_j θ_{n+j},   c_0 = 1 - w_1,  c_j = w_j - w_{j+1},  c_k = w_k.

So a wished decay is a weighted average of checkpoints: equal weights are a linear decay. The length of the averaged
window matters more than the number of checkpoints (arXiv 2505.12082).
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from trinity.errors import UserError

DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}
"""Scale of the update after a share x of the window, from 1 at its beginning to 0 at its end."""


def decay_weights(steps: Sequence[int], decay: str) -> list[float]:
    """The weight of each checkpoint, in the order of the steps; they sum to 1.

    Another decay d, with d(0) = 1 and d(1) = 0, scales the update that ends at checkpoint j of k + 1 evenly spaced ones
    by d(j/(k+1)): it reaches 0 one interval after the last. So a linear decay gives equal weights; "equal" does for any
    spacing.

    Raises:
        UserError: an unknown decay.
    """
    if decay == "equal":
        return [1 / len(steps)] * len(steps)
    if decay not in DECAYS:
        raise UserError(f"decay={decay!r} is unknown; use one of equal, {', '.join(DECAYS)}")
    length = (steps[-1] - steps[0]) * len(steps) / (len(steps) - 1)
    scales = [1.0, *(DECAYS[decay]((step - steps[0]) / length) for step in steps[1:]), 0.0]
    return [before - after for before, after in pairwise(scales)]
