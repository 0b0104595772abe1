"""Which config keys may change when a run is resumed.

free: how the run is executed (mesh, kernels, logs), and its length. accept: how the model learns; needs --accept-change
KEY. fixed: what the run trains on. content: the files are compared when they are opened, not their paths. The rule of a
key is that of the longest prefix in RULES. Paths are compared as absolute paths.
"""

from itertools import zip_longest
from typing import Literal

from trinity.config.load import flatten
from trinity.config.paths import absolute_paths
from trinity.config.phases import resolved_phases
from trinity.config.run import RunConfig
from trinity.errors import UserError

Rule = Literal["free", "accept", "fixed", "content"]

RULES: dict[str, Rule] = {
    "run": "free",
    "run.seed": "fixed",
    "init": "free",  # used only at the run's first start
    "model": "fixed",
    "data": "fixed",
    "data.train": "free",  # the saved data state identifies each source by its content, not by its path
    "data.loss": "accept",
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
    "train": "fixed",  # the optimizer has no state of what was frozen
    "train.expert_bias": "free",  # it refuses configs, and changes no run
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
"""Compared by trinity.training.lr_schedule_checks: a default decay length follows from the run's length."""


def rule_of(key: str) -> Rule:
    """The rule of one dotted key."""
    parts = key.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return RULES[next(prefix for prefix in prefixes if prefix in RULES)]


def check_changes(
    before: RunConfig,
    now: RunConfig,
    tokens_read: int,
    accepted: list[str],
    where: str,
    instead: str = "start a new run in another run.dir",
) -> list[str]:
    """Refuse changes that a resumed run must not make, except in DECAY_LENGTHS.

    Args:
        before, now: the config of the run so far, and the new one.
        tokens_read: tokens that the run had read before its last step; data phases that start at or below
            this count have begun.
        accepted: keys given with --accept-change; a key accepts everything below it.
        where: the run directory, for the message.
        instead: what to do to change a fixed key, for the message.
    Returns:
        the changed keys that are allowed, for the log.
    Raises:
        UserError: naming every changed key that is fixed or not accepted.
    """
    old, new = flatten(absolute_paths(before)), flatten(absolute_paths(now))
    changed = [key for key in new if old.get(key) != new[key] and rule_of(key) != "content"]
    changed = [key for key in changed if key not in DECAY_LENGTHS]
    fixed = [key for key in changed if rule_of(key) == "fixed"]
    if fixed:
        shown = ", ".join(f"{key} was {old.get(key)} and is {new[key]}" for key in fixed)
        raise UserError(f"{where} holds a run with another config ({shown}); restore the old value, or {instead}")
    _check_phases(before, now, tokens_read, where)
    unaccepted = [key for key in changed if rule_of(key) == "accept" and not accepts(accepted, key)]
    if unaccepted:
        shown = ", ".join(f"{key} was {old.get(key)} and is {new[key]}" for key in unaccepted)
        words = " ".join(f"--accept-change {key}" for key in unaccepted)
        raise UserError(f"resuming {where} would change how the model learns ({shown}); add {words} to accept it")
    return changed


def _check_phases(before: RunConfig, now: RunConfig, tokens_read: int, where: str) -> None:
    """Refuse changes of data phases that have begun."""
    old, new = ([p for p in resolved_phases(config.data) if p.tokens <= tokens_read] for config in (before, now))
    for number, (past, present) in enumerate(zip_longest(old, new)):
        if past is not None and present is not None:
            differing = [name for name in past._fields if getattr(past, name) != getattr(present, name)]
            shown = ", ".join(f"{name} was {getattr(past, name)} and is {getattr(present, name)}" for name in differing)
        else:
            shown = "it was removed" if present is None else "it was added"
        if shown:
            raise UserError(
                f"data phase {number} of {where} has begun and must not change ({shown}); restore it, and let changes "
                f"begin after {tokens_read} tokens"
            )


def accepts(accepted: list[str], key: str) -> bool:
    """Whether a key, or a section that holds it, is among those given with --accept-change."""
    return any(key == word or key.startswith(f"{word}.") for word in accepted)
