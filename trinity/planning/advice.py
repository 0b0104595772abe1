"""Advice for a plan: changes that make it fit in memory, or that reduce exposed communication.

Each change is checked and planned before it is advised.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

from trinity.config.check import check_run
from trinity.config.run import RunConfig
from trinity.errors import UserError
from trinity.parallel.mesh import mesh_words, meshes
from trinity.planning.memory import Memory
from trinity.planning.mesh_search import min_state_bytes, with_mesh
from trinity.planning.plan import USABLE_SHARE, Plan, StepEstimate, fits, peak_memory, replan
from trinity.training.divisibility import batch_process_counts, microbatch_notes

EXPOSED_LIMIT = 0.15
"""Warn from this share of exposed communication in the run's time on. Not from the report."""
MAX_TIME_RATIO = 0.95
"""Advise a change against exposed communication if the run then takes at most this share of its time. Not from the
report."""
MESHES_TRIED = 6
"""Meshes planned against exposed communication. Not from the report."""
UNSHARDED = ("activations", "gathered weights", "whole gradients being reduced")
"""Parts of Memory that hold whole rows or whole weights of one block, beside the work of that block."""


class Change(NamedTuple):
    """Settings as `a.b=value`, the config with them, and its number of GPUs."""

    words: list[str]
    config: RunConfig
    gpus: int


def warnings(plan: Plan) -> list[str]:
    """A sentence for each problem of the plan, with a change that solves it; empty for a good plan."""
    notes = microbatch_notes(plan.config, plan.gpus // max(1, plan.config.parallel.context))
    return [*_problems(plan), *(note.removeprefix("note: ") for note in notes)]


def _problems(plan: Plan) -> list[str]:
    if not plan.fits:
        most = USABLE_SHARE * plan.card.memory
        return [
            f"it does not fit: {plan.memory.total / 1e9:.1f} GB at the peak, of {most / 1e9:.1f} GB for tensors; "
            f"{_memory_advice(plan)}"
        ]
    return [_links_advice(plan)] if exposed_communication(plan) >= EXPOSED_LIMIT else []


def exposed_communication(plan: Plan) -> float:
    """Share of the run's time in communication that does not overlap with computation."""
    weights = [step.segment.steps or 1 for step in plan.steps]
    exposed = sum(weight * _exposed_seconds(step) for weight, step in zip(weights, plan.steps))
    return exposed / sum(weight * step.seconds.step for weight, step in zip(weights, plan.steps))


def _exposed_seconds(step: StepEstimate) -> float:
    return step.seconds.step - step.seconds.computing


def _memory_advice(plan: Plan) -> str:
    """A change that fits: the first of a group that does, or smaller microbatches alone if the run is then faster.

    The last change of a group needs the least memory, so it decides whether the group is searched.
    """
    for group in _memory_saving_changes(plan):
        if not group or not _fits_after(plan, group[-1]):
            continue
        first = next((change for change in group if _fits_after(plan, change)), None)
        if first is not None:
            return _fits_text(plan, _fastest(plan, [first, *_smaller_microbatches(plan)]))
    return _gpu_count_advice(plan)


def _smaller_microbatches(plan: Plan) -> list[Change]:
    """The largest microbatch that fits with the config's recompute; empty if none does."""
    batch, most = plan.config.batch, plan.config.batch.microbatch
    while most > 1:
        most //= 2
        config = replace(plan.config, batch=replace(batch, microbatch=most))
        change = Change([f"batch.microbatch={most}"], config, plan.gpus)
        if _fits_after(plan, change):
            return [change]
    return []


def _fastest(plan: Plan, changes: list[Change]) -> Change:
    """The change with the shortest run; every change must be one that fits."""
    if len(changes) == 1:
        return changes[0]
    return min(changes, key=lambda change: _run_seconds(replan(plan, change.config, change.gpus)))


def _gpu_count_advice(plan: Plan) -> str:
    """The fewest GPUs tried on which the run fits. Counts ascend, since a plan of thousands of GPUs takes seconds."""
    config, counts = plan.config, _larger_gpu_counts(plan)
    no_change = "neither recompute nor smaller microbatches nor more shards"
    if not counts:
        return f"{no_change} would, and batches and streams divide by no larger number of GPUs than {plan.gpus}"
    starts = [([], config), *_leaner_configs(config)[-1:]]
    leanest = _with_most_shards(plan, *starts[-1], plan.gpus)
    unsharded = _unsharded_bytes(plan, leanest)
    for gpus in counts:
        leanest_first = [_with_most_shards(plan, *start, gpus) for start in reversed(starts)]
        same_experts = leanest_first[0].config.parallel.expert == leanest.config.parallel.expert
        least = min_state_bytes(config) / gpus + (unsharded if same_experts else 0.0)
        if least > USABLE_SHARE * plan.card.memory:
            continue
        if _fits_after(plan, leanest_first[0]):
            return _fits_text(plan, next(change for change in reversed(leanest_first) if _fits_after(plan, change)))
    return f"{no_change} nor more GPUs would; batches and streams divide by {counts[-1]} at most"


def _unsharded_bytes(plan: Plan, change: Change) -> float:
    """Bytes after a change that more shards would not lessen; 0 where weights that they would shard are whole now."""
    memory = _memory_after(plan, change)
    if memory is None or change.config.parallel.shard <= change.config.parallel.expert:
        return 0.0
    return sum(size for name, size in memory.parts.items() if name in UNSHARDED or name.startswith("work of "))


def _larger_gpu_counts(plan: Plan) -> list[int]:
    """Larger GPU counts that divide batches and streams, each at least twice the one before, and the largest."""
    possible, counts = batch_process_counts(plan.config), [plan.gpus]
    for count in possible:
        if count >= 2 * counts[-1] or (count == possible[-1] > counts[-1]):
            counts.append(count)
    return counts[1:]


def _fits_after(plan: Plan, change: Change) -> bool:
    memory = _memory_after(plan, change)
    return memory is not None and fits(memory, plan.card)


def _fits_text(plan: Plan, change: Change) -> str:
    """The advice for a change that fits."""
    memory = peak_memory(change.config, change.gpus, plan.card, plan.cache)
    return f"{_settings_text(plan, change)} would, with {memory.total / 1e9:.1f} GB"


def _links_advice(plan: Plan) -> str:
    """The cost of exposed communication, and the change that reduces the run's time most."""
    now = _run_seconds(plan)
    faster = []
    for change in _faster_changes(plan):
        changed = _plan_after(plan, change)
        if changed is not None and changed.fits and _run_seconds(changed) <= MAX_TIME_RATIO * now:
            faster.append((_run_seconds(changed), change))
    step = plan.longest_step
    cost = (
        f"GPUs wait for links during {exposed_communication(plan):.0%} of the time: a step of "
        f"{step.segment.sequences:,} sequences takes {step.seconds.step:.3g} s and its computing "
        f"{step.seconds.computing:.3g} s"
    )
    if not faster:
        return f"{cost}; no mesh or microbatch that was tried is faster"
    best, change = min(faster, key=lambda entry: entry[0])
    return f"{cost}; {_settings_text(plan, change)} would take {best / now:.0%} of the time"


def _run_seconds(plan: Plan) -> float:
    """Seconds of the run, or of one step for a run of zero steps."""
    return plan.total_seconds or plan.longest_step.seconds.step


def _settings_text(plan: Plan, change: Change) -> str:
    """The words to add to the command, including a picked mesh."""
    words = {word.partition("=")[0]: word for word in [*plan.picked, *change.words]}
    if change.gpus == plan.gpus:
        return " ".join(words.values())
    return f"{change.gpus} GPUs (add {' '.join([f'--gpus {change.gpus}', *words.values()])})"


def _memory_after(plan: Plan, change: Change) -> Memory | None:
    """Peak memory after a change; None if the changed config is invalid."""
    try:
        check_run(change.config)
        return peak_memory(change.config, change.gpus, plan.card, plan.cache)
    except UserError:
        return None


def _plan_after(plan: Plan, change: Change) -> Plan | None:
    """The plan after a change; None if the changed config is invalid."""
    try:
        check_run(change.config)
        return replan(plan, change.config, change.gpus)
    except UserError:
        return None


def _memory_saving_changes(plan: Plan) -> Iterator[list[Change]]:
    """Groups of changes that save memory on the same GPUs: recompute with microbatches, then more shards.

    Groups, and the changes of a group, are ordered by the time they cost, least first.
    """
    config, gpus = plan.config, plan.gpus
    leaner = _leaner_configs(config)
    yield [Change(words, changed, gpus) for words, changed in leaner]
    starts = [([], config), *leaner[-1:]]
    shards = sorted({shard for _, shard, _ in _meshes(config, gpus) if shard > plan.sizes.shard})
    yield [_with_shards(plan, words, start, gpus, shard) for words, start in starts for shard in shards]


def _faster_changes(plan: Plan) -> Iterator[Change]:
    """Changes that communicate less: one microbatch a step, gradients reduced once a step, other meshes."""
    config, gpus = plan.config, plan.gpus
    rows = max(step.load.rows for step in plan.steps)
    if any(step.load.microbatches > 1 for step in plan.steps):
        yield Change([f"batch.microbatch={rows}"], replace(config, batch=replace(config.batch, microbatch=rows)), gpus)
        parallel = replace(config.parallel, defer_reduce="on")
        yield Change(["parallel.defer_reduce=on"], replace(config, parallel=parallel), gpus)
    near = sorted(
        (mesh for mesh in _meshes(config, gpus) if mesh[1:] != (plan.sizes.shard, plan.sizes.expert)),
        key=lambda mesh: (abs(mesh[1].bit_length() - plan.sizes.shard.bit_length()), mesh[2] > plan.card.per_node),
    )
    for mesh in near[:MESHES_TRIED]:
        words = mesh_words(config.parallel, *mesh)
        yield Change(words, with_mesh(config, words), gpus)


def _meshes(config: RunConfig, gpus: int) -> list[tuple[int, int, int]]:
    """Every mesh of the model on `gpus` GPUs with the config's context parallelism, if that divides them."""
    context = config.parallel.context
    return list(meshes(config.model, gpus, context if gpus % context == 0 else 1))


def _with_most_shards(plan: Plan, words: list[str], start: RunConfig, gpus: int) -> Change:
    """`start` with the largest number of shards on `gpus` GPUs, which needs the least memory."""
    return _with_shards(plan, words, start, gpus, max(shard for _, shard, _ in _meshes(start, gpus)))


def _with_shards(plan: Plan, words: list[str], start: RunConfig, gpus: int, shard: int) -> Change:
    """`start`, which has the settings `words`, with `shard` shards and the expert size nearest to the plan's."""
    experts = [expert for _, size, expert in _meshes(start, gpus) if size == shard] or [plan.sizes.expert]
    nearest = min(experts, key=lambda expert: abs(expert - plan.sizes.expert))
    mesh = mesh_words(start.parallel, gpus // shard, shard, nearest)
    return Change([*words, *mesh], with_mesh(start, mesh), gpus)


def _leaner_configs(config: RunConfig) -> list[tuple[list[str], RunConfig]]:
    """More recompute, then smaller microbatches with it; turns compile off, which excludes recompute."""
    kinds: list[Literal["none", "selective", "block"]] = ["none", "selective", "block"]
    stronger = kinds[kinds.index(config.recompute) + 1 :]
    compile_off = ["compile=none"] if config.compile != "none" and stronger else []
    configs = [
        (
            [f"recompute={kind}", *compile_off],
            replace(config, recompute=kind, compile="none" if compile_off else config.compile),
        )
        for kind in stronger
    ]
    words, most = ([f"recompute={kinds[-1]}", *compile_off] if stronger else []), config.batch.microbatch
    while most > 1:
        most //= 2
        batch = replace(config.batch, microbatch=most)
        leanest = configs[len(stronger) - 1][1] if stronger else config
        configs.append(([*words, f"batch.microbatch={most}"], replace(leanest, batch=batch)))
    return configs
