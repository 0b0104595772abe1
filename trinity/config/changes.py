"""What may differ when a run is resumed with a changed config.

free: how the run is done (meshes, kernels, logs), and its length. accept: how it learns; needs --accept-change KEY.
fixed: what the run is. content: compared by what the files hold when they are opened, not by their path. A key obeys
the longest rule that it begins with. Paths are compared absolute.
"""

from itertools import zip_longest
from typing import Literal

from trinity.config.load import flatten
from trinity.config.paths import absolute_paths
from trinity.config.phases import whole_phases
from trinity.config.run import RunConfig
from trinity.errors import UserError

Rule = Literal["free", "accept", "fixed", "content"]

RULES: dict[str, Rule] = {
    "run": "free",
    "run.seed": "fixed",
    "init": "free",  # read once, when the run starts
    "model": "fixed",
    "data": "fixed",
    "data.train": "free",  # the state of the data knows the content of every source, wherever it lies
    "data.tokenizer": "content",  # trinity.training.run_tokenizer
    "data.mixture": "free",  # compared by phase, as data.phases
    "data.phases": "free",
    "data.length_bias": "free",
    "data.validation": "free",
    "data.verify": "free",
    "data.workers": "free",
    "data.exhausted": "free",
    "batch": "accept",
    "batch.microbatch": "free",
    "optim": "accept",
    "optim.muon.share": "free",
    "balancing": "accept",
    "loss": "accept",
    "precision": "accept",
    "parallel": "free",
    "kernels": "free",
    "recompute": "free",
    "compile": "free",
    "checkpoint": "free",
    "export": "free",
    "evaluation": "free",
    "profile": "free",
    "log": "free",
    "health": "free",
}

DECAY_LENGTHS = ("optim.schedule.decay_steps", "optim.schedule.decay_tokens")
"""Compared by trinity.training.learning_rate, which derives the length from the run's where none is given."""


def rule_of(key: str) -> Rule:
    """The rule of one dotted key."""
    parts = key.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return RULES[next(prefix for prefix in prefixes if prefix in RULES)]


def check_changes(
    before: RunConfig,
    now: RunConfig,
    seen: int,
    accepted: list[str],
    where: str,
    instead: str = "start afresh with another run.dir",
) -> list[str]:
    """Refuse changes that a resumed run must not make; the length of a decay is not looked at (DECAY_LENGTHS).

    Args:
        before, now: config of the run so far, and the one asked for.
        seen: tokens that the run had seen before its last step: phases of the data up to there have begun.
        accepted: keys given with --accept-change; a key accepts everything below it.
        where: the run directory, for the message.
        instead: what to do where a fixed key is to differ, for the message.
    Returns:
        the changed keys that are allowed, for the log.
    Raises:
        UserError: naming every key that is fixed or not accepted.
    """
    old, new = flatten(absolute_paths(before)), flatten(absolute_paths(now))
    changed = [key for key in new if old.get(key) != new[key] and rule_of(key) != "content"]
    changed = [key for key in changed if key not in DECAY_LENGTHS]
    fixed = [key for key in changed if rule_of(key) == "fixed"]
    if fixed:
        shown = ", ".join(f"{key} was {old.get(key)} and is {new[key]}" for key in fixed)
        raise UserError(f"{where} holds a run of another config ({shown}); give it back, or {instead}")
    _check_phases(before, now, seen, where)
    asking = [key for key in changed if rule_of(key) == "accept" and not accepts(accepted, key)]
    if asking:
        shown = ", ".join(f"{key} was {old.get(key)} and is {new[key]}" for key in asking)
        words = " ".join(f"--accept-change {key}" for key in asking)
        raise UserError(f"going on from {where} would change how it learns ({shown}); say {words} if that is meant")
    return changed


def _check_phases(before: RunConfig, now: RunConfig, seen: int, where: str) -> None:
    """Phases that have begun are fixed: the history of a run is what it is."""
    old, new = ([p for p in whole_phases(config.data) if p.tokens <= seen] for config in (before, now))
    for number, (then, asked) in enumerate(zip_longest(old, new)):
        if then is not None and asked is not None:
            differing = [name for name in then._fields if getattr(then, name) != getattr(asked, name)]
            shown = ", ".join(f"{name} was {getattr(then, name)} and is {getattr(asked, name)}" for name in differing)
        else:
            shown = "there was one, which is gone" if asked is None else "there was none"
        if shown:
            raise UserError(
                f"{where} has begun with data phase {number} ({shown}); a phase that has begun stays as it is: "
                f"give it back, and let changes begin after {seen} tokens"
            )


def accepts(accepted: list[str], key: str) -> bool:
    """Whether a key, or one above it, is among those given with --accept-change."""
    return any(key == word or key.startswith(f"{word}.") for word in accepted)
