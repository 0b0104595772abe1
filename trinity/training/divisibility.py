"""Divisibility of a run: its global batches and streams by the data ranks, a rank's rows by the microbatch, its
sequence lengths by the ranks of context parallelism.

What does not divide is refused with the nearest settings and numbers of processes that do.
"""

import math
import shlex
from dataclasses import replace

from trinity.config.phases import resolved_phases
from trinity.config.run import RunConfig
from trinity.errors import UserError
from trinity.parallel.context_parallel import heads_fit
from trinity.parallel.mesh import Sizes, divisors, mesh_sizes, nearest_mesh


def microbatch_size(rows: int, limit: int) -> int:
    """The largest divisor of a rank's rows of the batch that is at most `limit`."""
    return max(size for size in range(1, min(rows, limit) + 1) if rows % size == 0)


def microbatch_notes(config: RunConfig, data_ranks: int) -> list[str]:
    """A note for each global batch whose rows on a rank are no multiple of batch.microbatch."""
    limit, notes = config.batch.microbatch, []
    for key, sequences in _global_batches(config).items():
        rows = sequences // data_ranks
        size = microbatch_size(rows, limit)
        if size < min(rows, limit):
            full = sorted({max(limit, rows // limit * limit) * data_ranks, -(-rows // limit) * limit * data_ranks})
            larger = next(number for number in range(limit, rows + 1) if rows % number == 0)
            notes.append(
                f"note: {rows} rows a rank ({key}={sequences}) are no multiple of batch.microbatch={limit}, so each "
                f"microbatch has {size} row{'s' * (size > 1)}; {key}={' or '.join(map(str, full))} would fill "
                f"microbatches of {limit}, and batch.microbatch={larger} would take {larger} rows at once"
            )
    return notes


def check_mesh(config: RunConfig, world: int) -> Sizes:
    """The mesh of a run on this many processes.

    Raises:
        UserError: with the nearest settings for which mesh, batches and streams divide, and numbers of processes.
    """
    try:
        sizes = mesh_sizes(config.parallel, config.model, world)
    except UserError as error:
        divides = config.parallel.context > 0 and _first_undivided(config) is None
        words = nearest_mesh(config.parallel, config.model, world, None if divides else 1)
        context = next((int(word.split("=")[1]) for word in words if "context" in word), config.parallel.context)
        settings = [*words, *divisible_settings(config, world // context)]
        raise UserError(f"{error}; use {' '.join(settings)}{_or_processes(config, world)}") from None
    _check_lengths(config, world)
    return sizes


def _check_lengths(config: RunConfig, world: int) -> None:
    """Refuse a number of context ranks that does not divide every sequence length of the run.

    Raises:
        UserError: naming the length, and the numbers that the run can use on these processes.
    """
    context, undivided = config.parallel.context, _first_undivided(config)
    if undivided:
        key, length = undivided
        numbers = context_sizes(config, world)
        words = [f"parallel.context={' or '.join(map(str, numbers))}"] if numbers else []
        words = words or [
            *nearest_mesh(config.parallel, config.model, world, context=1),
            *divisible_settings(config, world),
        ]
        raise UserError(f"parallel.context={context} does not divide {key}={length}; use {' '.join(words)}")


def _first_undivided(config: RunConfig) -> tuple[str, int] | None:
    """Setting and value of the first sequence length that parallel.context does not divide; None if it divides all."""
    context = config.parallel.context
    return next(((key, length) for key, length in _lengths(config).items() if length % context), None)


def context_sizes(config: RunConfig, world: int) -> list[int]:
    """The values of parallel.context that a run can use on `world` processes, if nothing else changes, smallest first:
    they divide every sequence length, make a mesh, split the heads, and leave batches that divide by the data ranks."""
    model = config.model
    numbers = [n for n in divisors(math.gcd(*_lengths(config).values())) if heads_fit(model.heads, model.kv_heads, n)]
    return [n for n in numbers if world % n == 0 and _fits(_with_context(config, n), world)]


def context_notes(config: RunConfig) -> list[str]:
    """A note where global attention gathers keys and values, because the ranks of context parallelism cannot split the
    heads."""
    model, context = config.model, config.parallel.context
    if heads_fit(model.heads, model.kv_heads, context):
        return []
    fitting = [n for n in divisors(model.heads) if n > 1 and heads_fit(model.heads, model.kv_heads, n)]
    others = f"; {' or '.join(map(str, fitting))} ranks can" if fitting else ""
    return [
        f"note: {context} ranks (parallel.context) cannot split {model.heads} query and {model.kv_heads} key/value "
        f"heads, so global layers gather keys and values, and the last rank of each row has the most work{others}"
    ]


def _lengths(config: RunConfig) -> dict[str, int]:
    """Every sequence length of the run, by setting."""
    lengths = {"data.sequence_length": config.data.sequence_length}
    for number, phase in enumerate(resolved_phases(config.data)[1:]):
        lengths[f"data.phases[{number}].sequence_length"] = phase.sequence_length
    return lengths


def _with_context(config: RunConfig, context: int) -> RunConfig:
    return replace(config, parallel=replace(config.parallel, context=context))


def _fits(config: RunConfig, world: int) -> bool:
    return _has_mesh(config, world) and first_indivisible(config, world // config.parallel.context) is None


def check_batches(config: RunConfig, data_ranks: int) -> None:
    """Refuse global batches and streams that do not divide by the data ranks.

    Raises:
        UserError: naming the first of them, settings that divide, and numbers of processes for the present settings.
    """
    indivisible = first_indivisible(config, data_ranks)
    if indivisible:
        settings = " ".join(divisible_settings(config, data_ranks))
        processes = data_ranks * config.parallel.context
        raise UserError(f"{indivisible}; use {settings}{_or_processes(config, processes)}")


def first_indivisible(config: RunConfig, data_ranks: int) -> str | None:
    """A clause on the first global batch or stream count that does not divide by the data ranks; None if all do."""
    for key, number in _split_over_ranks(config).items():
        if number % data_ranks:
            return f"{key}={number} does not divide by {data_ranks} data ranks"
    return None


def divisible_settings(config: RunConfig, data_ranks: int) -> list[str]:
    """Settings for the shell that set indivisible batches and streams to the nearest multiples of the data ranks."""
    batch, streams, settings = config.batch, config.data.streams, []
    if batch.sequences % data_ranks:
        settings.append(f"batch.sequences={_nearest_multiple(batch.sequences, data_ranks)}")
    if any(entry.sequences % data_ranks for entry in batch.ramp):
        ramp = [(entry.tokens, _nearest_multiple(entry.sequences, data_ranks)) for entry in batch.ramp]
        entries = [f"{{tokens: {tokens}, sequences: {sequences}}}" for tokens, sequences in ramp]
        settings.append(shlex.quote(f"batch.ramp=[{', '.join(entries)}]"))
    if streams % data_ranks:
        settings.append(f"data.streams={_nearest_multiple(streams, data_ranks)}")
    return settings


def process_counts(config: RunConfig) -> list[int]:
    """Every number of processes for which the mesh, all global batches and the streams divide, smallest first."""
    return [count for count in batch_process_counts(config) if _has_mesh(config, count)]


def batch_process_counts(config: RunConfig) -> list[int]:
    """Every number of processes for which all global batches and the streams divide on some mesh, smallest first.

    One replica on each process, or on each group of parallel.context processes, is always a mesh.
    """
    context = max(1, config.parallel.context)
    return [context * data_ranks for data_ranks in divisors(math.gcd(*_split_over_ranks(config).values()))]


def _split_over_ranks(config: RunConfig) -> dict[str, int]:
    """The numbers that are split evenly over the data ranks, by setting."""
    return _global_batches(config) | {"data.streams": config.data.streams}


def _nearest_multiple(number: int, divisor: int) -> int:
    """The nearest multiple of a divisor, at least the divisor itself."""
    return max(divisor, round(number / divisor) * divisor)


def _or_processes(config: RunConfig, processes: int) -> str:
    """The nearest few numbers of processes that the present settings allow, as the end of a sentence."""
    counts = sorted(sorted(process_counts(config), key=lambda count: abs(count - processes))[:6])
    return f", or start {' or '.join(map(str, counts))} process{'es' * (counts[-1] > 1)}" if counts else ""


def _has_mesh(config: RunConfig, world: int) -> bool:
    try:
        mesh_sizes(config.parallel, config.model, world)
    except UserError:
        return False
    return _first_undivided(config) is None


def _global_batches(config: RunConfig) -> dict[str, int]:
    """Every global batch size of the run, in sequences, by setting."""
    sizes = {"batch.sequences": config.batch.sequences}
    return sizes | {f"batch.ramp[{index}].sequences": entry.sequences for index, entry in enumerate(config.batch.ramp)}
