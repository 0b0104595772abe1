"""The learning-rate schedule: linear warm-up, constant, then decay to a fraction of the peak.

Nano and Mini: 2000 steps of warm-up, linear to 0. Large: the same warm-up, cosine to 1/10. The decay is measured in
steps or in tokens; the report gives tokens, and with a growing batch the two are not proportional.
"""

import math
from typing import Literal

from trinity.errors import UserError

# What is left of (peak − final) when the share p of the decay is done.
_REMAINDER = {
    "none": lambda p: 1.0,
    "linear": lambda p: 1.0 - p,
    "cosine": lambda p: 0.5 * (1.0 + math.cos(math.pi * p)),
}


def rate_scale(
    step: int,
    tokens: int,
    *,
    warmup_steps: int,
    decay: Literal["none", "linear", "cosine"],
    decay_start: int,
    decay_length: int,
    final: float,
    unit: Literal["steps", "tokens"],
) -> float:
    """The learning rate of one step as a fraction of its peak.

    Warm-up gives (step+1)/warmup_steps, so that the first step is not lost and step warmup_steps − 1 has the full rate.
    The decay starts from 1 at decay_start and reaches `final` at decay_start + decay_length, where it stays.
    Should they overlap, the two are multiplied.

    Args:
        step: 0-based.
        tokens: tokens seen before this step.
        warmup_steps: 0 for none.
        decay: the shape of the decay; with "none" the four arguments that follow do not matter.
        decay_start: in `unit`.
        decay_length: in `unit`; 0 drops to `final` at once.
        final: fraction of the peak.
        unit: what the decay is measured in.
    Raises:
        UserError: an unknown decay or unit.
    """
    if decay not in _REMAINDER:
        raise UserError(f"optim.schedule.decay={decay!r} is not known; use one of {', '.join(_REMAINDER)}")
    if unit not in ("steps", "tokens"):
        raise UserError(f"the decay cannot be measured in {unit!r}; use steps or tokens")
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    past = (step if unit == "steps" else tokens) - decay_start
    progress = min(1.0, max(0.0, past / decay_length)) if decay_length > 0 else float(past >= 0)
    return warmup * (final + (1.0 - final) * _REMAINDER[decay](progress))
