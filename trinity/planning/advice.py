"""What to change in a plan: so that it fits in memory, or so that GPUs wait less for links. All of it was tried.

Every change is checked and planned as a run with it would be, before it is named.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from trinity.config.check import check_run
from trinity.config.run import RunConfig
from trinity.errors import UserError
from trinity.parallel.mesh import mesh_words, meshes
from trinity.planning.gpus import least_state, with_mesh
from trinity.planning.memory import Memory
from trinity.planning.plan import USABLE, Plan, Step, fits, fullest_moment, replanned
from trinity.training.divisibility import batch_process_counts

WAITING = 0.15
"""Share of the run's time that computing waits for links, from which on that is said."""
HELPS = 0.95
"""A change is named where the run takes at most this much of the time."""
TRIED = 6
"""Meshes that are tried against slow links."""


class Change(NamedTuple):
    """Settings in dotted words, the config with them, and the number of GPUs that it is for."""

    words: list[str]
    config: RunConfig
    gpus: int


def warnings(plan: Plan) -> list[str]:
    """A sentence for everything that is wrong, with what would mend it; none for a good plan."""
    if not plan.fits:
        most = USABLE * plan.card.memory
        return [
            f"it does not fit: {plan.memory.total / 1e9:.1f} GB at the fullest moment, of {most / 1e9:.1f} GB for "
            f"tensors; {_mend(plan)}"
        ]
    return [_waiting(plan)] if waiting(plan) >= WAITING else []


def waiting(plan: Plan) -> float:
    """Share of the run's time that is spent on links and not hidden behind computing."""
    weights = [step.stretch.steps or 1 for step in plan.steps]
    idle = sum(weight * _idle(step) for weight, step in zip(weights, plan.steps))
    return idle / sum(weight * step.seconds.step for weight, step in zip(weights, plan.steps))


def _idle(step: Step) -> float:
    return step.seconds.step - step.seconds.computing


def _mend(plan: Plan) -> str:
    """A change that fits: the first of a group, or smaller microbatches alone where the run is then shorter.

    Of each group the last, which needs the least memory, shows whether any may fit.
    """
    for group in _leaner_changes(plan):
        if not group or not _fits_after(plan, group[-1]):
            continue
        first = next((change for change in group if _fits_after(plan, change)), None)
        if first is not None:
            change = _shorter(plan, [first, *_smaller_microbatches(plan)])
            return f"{_in_words(plan, change)} would, with {_memory_after(plan, change).total / 1e9:.1f} GB"
    return _mend_with_more_gpus(plan)


def _smaller_microbatches(plan: Plan) -> list[Change]:
    """The largest microbatch that fits with the recompute that the config has; none where no microbatch does."""
    batch, most = plan.config.batch, plan.config.batch.microbatch
    while most > 1:
        most //= 2
        config = replace(plan.config, batch=replace(batch, microbatch=most))
        change = Change([f"batch.microbatch={most}"], config, plan.gpus)
        if _fits_after(plan, change):
            return [change]
    return []


def _shorter(plan: Plan, changes: list[Change]) -> Change:
    """The change with which the run takes the least time."""
    if len(changes) == 1:
        return changes[0]
    return min(changes, key=lambda change: _time(_plan_after(plan, change)))


def _mend_with_more_gpus(plan: Plan) -> str:
    """The fewest GPUs tried on which the plan fits; a plan of thousands takes seconds, so fewest come first."""
    config, counts = plan.config, _more_gpus(plan)
    neither = "neither recompute nor smaller microbatches nor more shards"
    if not counts:
        return f"{neither} would, and batches and streams divide by no larger number of GPUs than {plan.gpus}"
    starts = [([], config), *_leaner(config)[-1:]]
    for gpus in counts:
        if least_state(config) / gpus > USABLE * plan.card.memory:
            continue
        leanest_first = [_most_sharded(plan, *start, gpus) for start in reversed(starts)]
        if _fits_after(plan, leanest_first[0]):
            change = next(change for change in reversed(leanest_first) if _fits_after(plan, change))
            return f"{_in_words(plan, change)} would, with {_memory_after(plan, change).total / 1e9:.1f} GB"
    return f"{neither} nor more GPUs would; batches and streams divide by {counts[-1]} at most"


def _more_gpus(plan: Plan) -> list[int]:
    """Numbers that batches and streams divide by, each at least twice the one before it; and the largest of them."""
    every, counts = batch_process_counts(plan.config), [plan.gpus]
    for count in every:
        if count >= 2 * counts[-1] or (count == every[-1] > counts[-1]):
            counts.append(count)
    return counts[1:]


def _fits_after(plan: Plan, change: Change) -> bool:
    memory = _memory_after(plan, change)
    return memory is not None and fits(memory, plan.card)


def _waiting(plan: Plan) -> str:
    """What links cost, and the best of the changes that help."""
    now = _time(plan)
    faster = []
    for change in _faster_changes(plan):
        changed = _plan_after(plan, change)
        if changed is not None and changed.fits and _time(changed) <= HELPS * now:
            faster.append((_time(changed), change))
    said = (
        f"GPUs wait for links during {waiting(plan):.0%} of the time: a step of {plan.main.stretch.sequences:,} "
        f"sequences takes {plan.main.seconds.step:.3g} s and its computing {plan.main.seconds.computing:.3g} s"
    )
    if not faster:
        return f"{said}; no mesh or microbatch that was tried is faster"
    best, change = min(faster, key=lambda entry: entry[0])
    return f"{said}; {_in_words(plan, change)} would take {best / now:.0%} of the time"


def _time(plan: Plan) -> float:
    return plan.total_seconds or plan.main.seconds.step


def _in_words(plan: Plan, change: Change) -> str:
    """Everything to add to the command: the mesh that was picked is part of it."""
    words = {word.partition("=")[0]: word for word in [*plan.picked, *change.words]}
    if change.gpus == plan.gpus:
        return " ".join(words.values())
    return f"{change.gpus} GPUs (tools/plan.py {' '.join([f'--gpus {change.gpus}', *words.values()])})"


def _memory_after(plan: Plan, change: Change) -> Memory | None:
    """The fullest moment after a change; None where the run would be refused."""
    try:
        check_run(change.config)
        return fullest_moment(change.config, change.gpus, plan.card, plan.measured)
    except UserError:
        return None


def _plan_after(plan: Plan, change: Change) -> Plan | None:
    """The plan after a change; None where the run would be refused."""
    try:
        check_run(change.config)
        return replanned(plan, change.config, change.gpus)
    except UserError:
        return None


def _leaner_changes(plan: Plan) -> Iterator[list[Change]]:
    """Groups of changes that save memory on as many GPUs, in both orders those that cost least first: recompute and
    microbatches, more shards."""
    config, gpus = plan.config, plan.gpus
    leaner = _leaner(config)
    yield [Change(words, changed, gpus) for words, changed in leaner]
    starts = [([], config), *leaner[-1:]]
    shards = sorted({shard for _, shard, _ in meshes(config.model, gpus) if shard > plan.sizes.shard})
    yield [_resharded(plan, before, start, gpus, shard) for before, start in starts for shard in shards]


def _faster_changes(plan: Plan) -> Iterator[Change]:
    """Changes that send less: the whole share of a step at once, gradients once a step, other meshes."""
    config, gpus = plan.config, plan.gpus
    rows = max(step.load.rows for step in plan.steps)
    if any(step.load.microbatches > 1 for step in plan.steps):
        yield Change([f"batch.microbatch={rows}"], replace(config, batch=replace(config.batch, microbatch=rows)), gpus)
        parallel = replace(config.parallel, defer_reduce="on")
        yield Change(["parallel.defer_reduce=on"], replace(config, parallel=parallel), gpus)
    near = sorted(
        (mesh for mesh in meshes(config.model, gpus) if mesh[1:] != (plan.sizes.shard, plan.sizes.expert)),
        key=lambda mesh: (abs(mesh[1].bit_length() - plan.sizes.shard.bit_length()), mesh[2] > plan.card.per_node),
    )
    for mesh in near[:TRIED]:
        words = mesh_words(config.parallel, *mesh)
        yield Change(words, with_mesh(config, words), gpus)


def _most_sharded(plan: Plan, before: list[str], start: RunConfig, gpus: int) -> Change:
    """The largest number of shards on a number of GPUs, which needs the least memory."""
    return _resharded(plan, before, start, gpus, max(shard for _, shard, _ in meshes(start.model, gpus)))


def _resharded(plan: Plan, before: list[str], start: RunConfig, gpus: int, shard: int) -> Change:
    """Other shards, with as many ranks that split the experts as before where those divide, else the nearest number."""
    experts = [number for _, size, number in meshes(start.model, gpus) if size == shard] or [plan.sizes.expert]
    nearest = min(experts, key=lambda number: abs(number - plan.sizes.expert))
    words = mesh_words(start.parallel, gpus // shard, shard, nearest)
    return Change([*before, *words], with_mesh(start, words), gpus)


def _leaner(config: RunConfig) -> list[tuple[list[str], RunConfig]]:
    """More recompute, then smaller microbatches with it; what is compiled cannot be computed again."""
    kinds = ["none", "selective", "block"]
    stronger = kinds[kinds.index(config.recompute) + 1 :]
    plain = ["compile=none"] if config.compile != "none" and stronger else []
    found = [
        ([f"recompute={kind}", *plain], replace(config, recompute=kind, compile="none" if plain else config.compile))
        for kind in stronger
    ]
    words, most = ([f"recompute={kinds[-1]}", *plain] if stronger else []), config.batch.microbatch
    while most > 1:
        most //= 2
        batch = replace(config.batch, microbatch=most)
        leanest = found[len(stronger) - 1][1] if stronger else config
        found.append(([*words, f"batch.microbatch={most}"], replace(leanest, batch=batch)))
    return found
