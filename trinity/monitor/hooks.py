"""The interface between a training step and the monitor: the hooks that train_step calls, and the result it returns.

Shapes: M MoE layers, E experts.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

SkipReason = Literal["not finite", "spike"]


class StepHooks(NamedTuple):
    """Hooks for the next train_step.

    microbatch_done: called after the backward pass of each microbatch.
    detect_spike: (loss, gradient norm), both finite → a clause that describes the spike, None for an ordinary step.
    skip_spikes: whether a step with a spike is skipped.
    """

    microbatch_done: Callable[[], None] | None = None
    detect_spike: Callable[[float, float], str | None] | None = None
    skip_spikes: bool = False


NO_HOOKS = StepHooks()


class StepResult(NamedTuple):
    """The result of one train_step, equal on every rank; tensors and numbers are on the host.

    metrics: the step's fields of metrics.jsonl, in their order there.
    skip_reason: why no weight, momentum and bias was changed; None where the step was taken.
    spike: what detect_spike returned, whether or not the step was skipped for it.
    source_counts: sums over all ranks of the source_counts that train_step was given; None without them.
    counts_ME: int64, tokens of the global batch per layer and expert; None without MoE layers.
    router_entropy_M: float64, mean over the global batch's tokens of each router's entropy; None without MoE layers.
    attention_spread: the most pairs of query and key that a rank's attention computes, over the mean of the ranks
        (trinity.training.attention_pairs). The one number that depends on the mesh.
    """

    metrics: dict[str, Any]
    skip_reason: SkipReason | None
    spike: str | None
    source_counts: list[float] | None
    counts_ME: Tensor | None
    router_entropy_M: Tensor | None
    attention_spread: float | None = None
