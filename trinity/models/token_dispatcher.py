"""The one seam for experts: how tokens reach the experts they chose, wherever those are.

The MoE layer calls its dispatcher and does not know which it is. `local` is for experts that are all here;
trinity.parallel.exchange gives the layer another where processes split the experts among them.

Shapes: T tokens, D width, K active experts, R tokens that an expert module sees.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

RunExperts = Callable[..., Tensor]
"""The experts as a module: (x_RD, indices_RK, gates_RK, rows) → [R, D], see trinity.models.moe.Experts.forward."""


class Dispatcher(Protocol):
    """Brings tokens to their experts and the weighted sums back."""

    def __call__(
        self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor, experts: RunExperts, meanwhile: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Run the chosen experts.

        Args:
            x_TD: tokens, any floating point; T may be 0.
            indices_TK: [T, K] int64, which of all the layer's experts.
            gates_TK: [T, K] fp32 or float64, differentiable.
            experts: is called exactly once, also without tokens: what gathers its weights waits for every process.
            meanwhile: other work of the layer on the same tokens, done while they travel.
        Returns:
            [T, D], each token's weighted sum over its experts, in x's dtype; and what `meanwhile` returned.
        """
        ...


def local(
    x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor, experts: RunExperts, meanwhile: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """The Dispatcher for experts that are all here: nothing travels."""
    done = meanwhile()
    return experts(x_TD, indices_TK, gates_TK), done
