"""Divisibility of a run: its global batches and streams by the data ranks, a rank's rows by the microbatch.

What does not divide is refused with the nearest settings and numbers of processes that do.
"""

import math
import shlex

from trinity.config.run import RunConfig
from trinity.errors import UserError
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
        return mesh_sizes(config.parallel, config.model, world)
    except UserError as error:
        settings = [*nearest_mesh(config.parallel, config.model, world), *divisible_settings(config, world)]
        raise UserError(f"{error}; use {' '.join(settings)}{_or_processes(config, world)}") from None


def check_batches(config: RunConfig, data_ranks: int) -> None:
    """Refuse global batches and streams that do not divide by the data ranks.

    Raises:
        UserError: naming the first of them, settings that divide, and numbers of processes for the present settings.
    """
    indivisible = first_indivisible(config, data_ranks)
    if indivisible:
        settings = " ".join(divisible_settings(config, data_ranks))
        raise UserError(f"{indivisible}; use {settings}{_or_processes(config, data_ranks)}")


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

    One replica on each process is always a mesh.
    """
    return divisors(math.gcd(*_split_over_ranks(config).values()))


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
    return True


def _global_batches(config: RunConfig) -> dict[str, int]:
    """Every global batch size of the run, in sequences, by setting."""
    sizes = {"batch.sequences": config.batch.sequences}
    return sizes | {f"batch.ramp[{index}].sequences": entry.sequences for index, entry in enumerate(config.batch.ramp)}
