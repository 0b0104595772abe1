"""The learning-rate schedule of a config: the rate of each step, what is odd about it, and changes of it on resume.

A decay without a length of its own ends with the run, so a longer run stretches it. A resumed run must not do that
unasked: the rate, already decayed, would rise again.
"""

from typing import NamedTuple

from trinity.config.changes import accepts
from trinity.config.run import RunConfig
from trinity.data.stream.batch_schedule import BatchPlan
from trinity.errors import UserError
from trinity.optim.lr_schedule import rate_scale


class Decay(NamedTuple):
    """Where a decay begins and how long it takes, in steps or tokens; length None: the run ends before it begins."""

    unit: str
    start: int
    length: int | None


def decay_of(config: RunConfig) -> Decay | None:
    """The decay of a config, with the length that follows from the run's where it has none of its own."""
    schedule = config.optim.schedule
    if schedule.decay == "none":
        return None
    unit = "tokens" if schedule.decay_start_tokens is not None else "steps"
    start = getattr(schedule, f"decay_start_{unit}")
    length, whole = getattr(schedule, f"decay_{unit}"), getattr(config.run, unit)
    if length is None and whole > start:
        length = whole - start
    return Decay(unit, start, length)


def decay_follows_length(config: RunConfig) -> bool:
    """Whether the decay has no length of its own, so that a longer run would stretch it."""
    decay = decay_of(config)
    if decay is None or decay.length is None:
        return False
    return getattr(config.optim.schedule, f"decay_{decay.unit}") is None


def rates_at(config: RunConfig, step: int, tokens: int) -> float:
    """Fraction of the peak learning rates for the step that begins after `step` steps and `tokens` tokens."""
    schedule, decay = config.optim.schedule, decay_of(config)
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


def schedule_notes(config: RunConfig, total: int, plan: BatchPlan) -> list[str]:
    """Notes for the start of a run of `total` steps: warm-up or decay that does not fit into it."""
    notes, schedule, decay = [], config.optim.schedule, decay_of(config)
    if schedule.warmup_steps > total:
        reached = rates_at(config, total - 1, plan.at(total - 1).tokens)
        notes.append(
            f"note: optim.schedule.warmup_steps={schedule.warmup_steps} is more than the run's {total} steps: the "
            f"learning rate only reaches {reached:.3g} of its peak"
        )
    end = {"steps": total, "tokens": plan.at(total).tokens}
    if decay is not None and decay.start >= end[decay.unit]:
        notes.append(
            f"note: optim.schedule.decay_start_{decay.unit}={decay.start} is not before the end of the run at "
            f"{end[decay.unit]} {decay.unit}: the learning rate does not decay"
        )
    elif decay is not None and decay.unit == "steps" and decay.start < schedule.warmup_steps:
        notes.append(
            f"note: optim.schedule.decay_start_steps={decay.start} is before the end of the warm-up at step "
            f"{schedule.warmup_steps}: the learning rate never reaches its peak"
        )
    return notes


def check_decay(
    before: RunConfig, now: RunConfig, step: int, tokens: int, accepted: list[str], where: str
) -> list[str]:
    """Refuse another length of the decay, given or following from the run's, unless it is accepted.

    A run that ended before its decay began had no length that could change. A decay that begins elsewhere is a change
    of its own, accepted by its own key, which the length that follows from it needs no other for.

    Args:
        before, now: config of the run so far, and the one asked for.
        step, tokens: how far the run is.
        accepted: keys given with --accept-change.
        where: the run directory, for the message.
    Returns:
        the key whose value is another one, if there is one.
    Raises:
        UserError: naming both learning rates of the next step.
    """
    old, new = decay_of(before), decay_of(now)
    if old is None or new is None or old.unit != new.unit or old.length in (None, new.length):
        return []
    key = f"optim.schedule.decay_{old.unit}"
    follows = old.start != new.start and getattr(now.optim.schedule, f"decay_{new.unit}") is None
    if accepts(accepted, key) or follows:
        return [key]
    rates = [rates_at(config, step, tokens) for config in (before, now)]
    peak = now.optim.muon.lr
    became = "none" if new.length is None else f"{new.length} {new.unit}"
    effect = f"rates differ from {new.start} {new.unit} on"
    if rates[0] != rates[1]:
        effect = (
            f"the next step's rate would be {rates[1]:.3g} of the peak (optim.muon.lr {rates[1] * peak:.3g}) "
            f"in place of {rates[0]:.3g} ({rates[0] * peak:.3g})"
        )
    raise UserError(
        f"going on from {where} would change the decay of the learning rate from {old.length} {old.unit} to {became}: "
        f"{effect}; say --accept-change optim.schedule if that is meant, or set {key}={old.length} to keep the decay "
        "as it is, after which the rate stays at optim.schedule.final"
    )
