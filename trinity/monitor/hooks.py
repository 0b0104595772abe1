"""What happens around a training step, as functions that train_step calls: for the heartbeat, spikes and routers."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class StepHooks(NamedTuple):
    """What watches a step from outside.

    beat: called when a microbatch is done.
    judge: (loss, gradient norm), both finite → what is out of the ordinary about them, None for nothing.
    skips: whether such a step is skipped.
    routed: called with the tokens per layer and expert of the global batch, [M, E] int64, and the mean entropy of
        each layer's router, [M]; both on the CPU.
    """

    beat: Callable[[], None] | None = None
    judge: Callable[[float, float], str | None] | None = None
    skips: bool = False
    routed: Callable[[Tensor, Tensor], None] | None = None


NO_HOOKS = StepHooks()
