"""Checks of the learning-rate schedule: notes at the start of a run, and changes on resume.

The schedule itself is trinity/optim/lr_schedule.py. A decay without a length of its own ends with the run, so a longer
run stretches it. A resumed run must not do so unless that is accepted: the rate, already decayed, would rise.
"""

from trinity.config.changes import accepts
from trinity.config.run import RunConfig
from trinity.data.stream.batch_schedule import BatchPlan
from trinity.errors import UserError
from trinity.optim.lr_schedule import lr_fraction, resolved_decay


def decay_ends_with_run(config: RunConfig) -> bool:
    """Whether the decay has no length of its own, so that a longer run would stretch it."""
    decay = resolved_decay(config)
    if decay is None or decay.length is None:
        return False
    return getattr(config.optim.schedule, f"decay_{decay.unit}") is None


def schedule_notes(config: RunConfig, total: int, plan: BatchPlan) -> list[str]:
    """Notes at the start of a run of `total` steps: a warm-up or a decay that does not fit into it."""
    notes, schedule, decay = [], config.optim.schedule, resolved_decay(config)
    if schedule.warmup_steps > total:
        reached = lr_fraction(config, total - 1, plan.at(total - 1).tokens)
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
    """Refuse a changed length of the decay, given or resolved from the run's length, unless it is accepted.

    If the earlier run ended before its decay started, there was no length to change. A new start of the decay is a
    change with a key of its own; accepting that also accepts the length that follows from it.

    Args:
        before, now: config of the run so far, and of this start.
        step, tokens: steps and tokens made so far.
        accepted: keys given with --accept-change.
        where: the run directory, for the message.
    Returns:
        the key of the changed length, or nothing.
    Raises:
        UserError: with both learning rates of the next step.
    """
    old, new = resolved_decay(before), resolved_decay(now)
    if old is None or new is None or old.unit != new.unit or old.length in (None, new.length):
        return []
    key = f"optim.schedule.decay_{old.unit}"
    follows_start = old.start != new.start and getattr(now.optim.schedule, f"decay_{new.unit}") is None
    if accepts(accepted, key) or follows_start:
        return [key]
    fractions = [lr_fraction(config, step, tokens) for config in (before, now)]
    peak = now.optim.muon.lr
    new_length = "none" if new.length is None else f"{new.length} {new.unit}"
    effect = f"rates differ from {new.start} {new.unit} on"
    if fractions[0] != fractions[1]:
        effect = (
            f"the next step's rate would be {fractions[1]:.3g} of the peak (optim.muon.lr {fractions[1] * peak:.3g}) "
            f"in place of {fractions[0]:.3g} ({fractions[0] * peak:.3g})"
        )
    raise UserError(
        f"resuming {where} would change the decay of the learning rate from {old.length} {old.unit} to "
        f"{new_length}: {effect}; add --accept-change optim.schedule if that is meant, or set {key}={old.length} to "
        "keep the decay as it is, after which the rate stays at optim.schedule.final"
    )
