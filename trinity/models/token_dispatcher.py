"""Token dispatch: send tokens to the experts they chose, on any rank, and return the weighted sums.

A MoE layer calls its dispatcher without knowing which one it has. `local_dispatch` serves a layer whose experts are all
on this rank; under expert parallelism trinity.parallel.expert_parallel gives the layer another one.

Shapes: T tokens, D width, K active experts, R tokens that the experts module receives.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

RunExperts = Callable[..., Tensor]
"""The experts module as a function: (x_RD, indices_RK, gates_RK, rows) → [R, D]; see trinity.models.moe.Experts."""


class Dispatcher(Protocol):
    """Sends tokens to their experts and brings the weighted sums back."""

    def __call__(
        self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor, experts: RunExperts, overlap: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Run the chosen experts.

        Args:
            x_TD: tokens, any floating point; T may be 0.
            indices_TK: [T, K] int64, numbers among all experts of the layer.
            gates_TK: [T, K] fp32 or float64, differentiable.
            experts: called exactly once, even without tokens, because every rank takes part in gathering its weights.
            overlap: other work of the layer on the same tokens, done while the tokens are sent (the shared expert).
        Returns:
            [T, D], each token's weighted sum over its experts, in x's dtype; and the result of `overlap`.
        """
        ...


def local_dispatch(
    x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor, experts: RunExperts, overlap: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """The Dispatcher of a layer whose experts are all on this rank: nothing is sent."""
    other = overlap()
    return experts(x_TD, indices_TK, gates_TK), other
