"""Learning-rate schedule: linear warm-up, constant, then decay to a fraction of the peak.

Nano and Mini: 2000 steps of warm-up, linear to 0. Large: the same warm-up, cosine to 1/10. The decay is measured in
steps or in tokens. The report gives tokens; with a growing batch size the two are not proportional.
"""

import math
from typing import Literal, NamedTuple

from trinity.config.run import RunConfig
from trinity.errors import UserError

# Fraction of (peak − final) that remains after the fraction p of the decay.
_DECAY_SHAPES = {
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

    Warm-up gives (step+1)/warmup_steps: the first step has a rate above 0, and step warmup_steps − 1 has the full rate.
    The decay starts from 1 at decay_start, reaches `final` at decay_start + decay_length and stays there. Where they
    overlap, the two factors are multiplied.

    Args:
        step: 0-based.
        tokens: tokens trained on before this step.
        warmup_steps: 0 for no warm-up.
        decay: shape of the decay; with "none" the next four arguments have no effect.
        decay_start: in `unit`.
        decay_length: in `unit`; 0 drops to `final` at once.
        final: fraction of the peak.
        unit: unit of decay_start and decay_length.
    Raises:
        UserError: an unknown decay or unit.
    """
    if decay not in _DECAY_SHAPES:
        raise UserError(f"optim.schedule.decay={decay!r} is not known; use one of {', '.join(_DECAY_SHAPES)}")
    if unit not in ("steps", "tokens"):
        raise UserError(f"the decay cannot be measured in {unit!r}; use steps or tokens")
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    past = (step if unit == "steps" else tokens) - decay_start
    progress = min(1.0, max(0.0, past / decay_length)) if decay_length > 0 else float(past >= 0)
    return warmup * (final + (1.0 - final) * _DECAY_SHAPES[decay](progress))


class Decay(NamedTuple):
    """Start and length of a decay, in steps or tokens; the length is None if the run ends before the decay starts."""

    unit: Literal["steps", "tokens"]
    start: int
    length: int | None


def resolved_decay(config: RunConfig) -> Decay | None:
    """The decay of a config; without a length of its own it ends with the run. None without a decay."""
    schedule = config.optim.schedule
    if schedule.decay == "none":
        return None
    unit: Literal["steps", "tokens"] = "tokens" if schedule.decay_start_tokens is not None else "steps"
    start = getattr(schedule, f"decay_start_{unit}")
    length, end = getattr(schedule, f"decay_{unit}"), getattr(config.run, unit)
    if length is None and end > start:
        length = end - start
    return Decay(unit, start, length)


def lr_fraction(config: RunConfig, step: int, tokens: int) -> float:
    """Fraction of the peak learning rates for the next step, after `step` steps and `tokens` tokens."""
    schedule, decay = config.optim.schedule, resolved_decay(config)
    return rate_scale(
        step,
        tokens,
        warmup_steps=schedule.warmup_steps,
        decay=schedule.decay,
        decay_start=decay.start if decay else 0,
        decay_length=1 if decay is None or decay.length is None else decay.length,
        final=schedule.final,
        unit=decay.unit if decay else "steps",
    )
