"""From a config to the things it describes: model, optimizers, batches. Each function builds one; data: run_data."""

import math
import shlex
from dataclasses import fields

import torch

from trinity.config.phases import resolved_phases
from trinity.config.run import KernelsConfig, RunConfig
from trinity.data.stream.batch_schedule import BatchHistory, BatchPlan
from trinity.errors import UserError
from trinity.models.fp8 import use_fp8
from trinity.models.param_roles import parameter_roles
from trinity.models.trinity import Trinity
from trinity.optim.build import Optimizers, build_optimizers
from trinity.parallel.activation_checkpoint import recompute_blocks
from trinity.parallel.compilation import compile_blocks
from trinity.parallel.fsdp import master_dtype, shard_model
from trinity.parallel.mesh import Ranks, Sizes, divisors, mesh_sizes, nearest_mesh
from trinity_kernels.expert_engines import ENGINES, check_engine
from trinity_kernels.op import interpreted


def build_model(config: RunConfig, ranks: Ranks) -> Trinity:
    """The model, sharded over the mesh; its values are garbage until initialised or loaded.

    Raises:
        UserError: a kernel or a number format that is asked for and cannot run on this device.
    """
    will_run = ranks.device.type != "meta"  # else it is a plan's, wherever that is made
    if will_run:
        check_kernels(config.kernels, ranks.device)
    with torch.device("meta"):
        model = Trinity(config.model, config.kernels).to(master_dtype(config.precision))
    if config.precision.fp8 != "none" and will_run:
        use_fp8(model, config.precision.fp8, ranks.device)
    if config.recompute != "none":
        recompute_blocks(model, config.recompute)
    if config.compile == "block":
        compile_blocks(model)
    shard_model(model, ranks, config.precision, config.parallel.exchange)
    return model.to_empty(device=ranks.device)


def check_kernels(kernels: KernelsConfig, device: torch.device) -> None:
    """Refuse kernels that were asked for by name and cannot run on a device.

    Raises:
        UserError: naming the setting.
    """
    for name in (field.name for field in fields(kernels)):
        if getattr(kernels, name) == "triton" and device.type != "cuda" and not interpreted():
            raise UserError(f"kernels.{name}=triton needs an NVIDIA GPU; use auto or reference")
    if kernels.experts in ENGINES:
        try:
            check_engine(kernels.experts, device.type)
        except ValueError as error:
            raise UserError(f"kernels.experts={kernels.experts} cannot be used: {error}") from error


def make_optimizers(config: RunConfig, model: Trinity) -> Optimizers:
    """Muon and AdamW over the model's parameters."""
    muon = {field.name: getattr(config.optim.muon, field.name) for field in fields(config.optim.muon)}
    muon["dtype"], muon["kernel"] = getattr(torch, config.optim.muon.dtype), config.kernels.newton_schulz
    adamw = config.optim.adamw
    return build_optimizers(
        parameter_roles(model),
        model.parameters(),
        muon=muon,
        adamw={"lr": adamw.lr, "betas": adamw.betas, "eps": adamw.eps, "weight_decay": adamw.weight_decay},
        router=config.optim.router,
    )


def batch_plan(config: RunConfig, history: BatchHistory = BatchHistory()) -> BatchPlan:  # noqa: B008 (immutable)
    """The sequences of each step; those of `history` are made, and the config holds from its end on."""
    ramp = [(entry.tokens, entry.sequences) for entry in config.batch.ramp]
    phases = [(phase.tokens, phase.sequence_length) for phase in resolved_phases(config.data)[1:]]
    return BatchPlan(config.batch.sequences, ramp, config.data.sequence_length, phases, history)


def total_steps(config: RunConfig, plan: BatchPlan) -> int:
    """Length of the run in optimizer steps."""
    return plan.steps_for_tokens(config.run.tokens) if config.run.steps is None else config.run.steps


def microbatch_size(share: int, most: int) -> int:
    """The largest divisor of a rank's share of the batch that is at most `most`."""
    return max(size for size in range(1, min(share, most) + 1) if share % size == 0)


def microbatch_notes(config: RunConfig, data_ranks: int) -> list[str]:
    """A sentence for each global batch whose share of a rank is no multiple of batch.microbatch."""
    most, notes = config.batch.microbatch, []
    for key, sequences in _batch_sizes(config).items():
        share = sequences // data_ranks
        size = microbatch_size(share, most)
        if size < min(share, most):
            whole = sorted({max(most, share // most * most) * data_ranks, -(-share // most) * most * data_ranks})
            larger = next(rows for rows in range(most, share + 1) if share % rows == 0)
            notes.append(
                f"note: {share} rows a rank ({key}={sequences}) are no multiple of batch.microbatch={most}, so each "
                f"microbatch has {size} row{'s' * (size > 1)}; {key}={' or '.join(map(str, whole))} would fill "
                f"microbatches of {most}, and batch.microbatch={larger} would take {larger} rows at once"
            )
    return notes


def check_mesh(config: RunConfig, world: int) -> Sizes:
    """The mesh of a run on this many processes.

    Raises:
        UserError: naming the settings that make mesh, batches and streams divide, and numbers of processes that do.
    """
    try:
        return mesh_sizes(config.parallel, config.model, world)
    except UserError as error:
        words = [*nearest_mesh(config.parallel, config.model, world), *batch_words(config, world)]
        raise UserError(f"{error}; use {' '.join(words)}{_or_processes(config, world)}") from None


def check_batches(config: RunConfig, data_ranks: int) -> None:
    """Refuse global batches and streams that do not divide by the ranks that hold different tokens.

    Raises:
        UserError: naming the first, the settings that mend all of them, and numbers of processes that need no mending.
    """
    undivided = first_undivided(config, data_ranks)
    if undivided:
        words = " ".join(batch_words(config, data_ranks))
        raise UserError(f"{undivided}; use {words}{_or_processes(config, data_ranks)}")


def first_undivided(config: RunConfig, data_ranks: int) -> str | None:
    """The first global batch or number of streams that does not divide by the ranks, in words; None where all do."""
    for key, number in _divided(config).items():
        if number % data_ranks:
            return f"{key}={number} does not divide by {data_ranks} data ranks"
    return None


def batch_words(config: RunConfig, data_ranks: int) -> list[str]:
    """The settings, quoted for a shell, that make global batches and streams the nearest multiples of the ranks."""
    batch, streams, words = config.batch, config.data.streams, []
    if batch.sequences % data_ranks:
        words.append(f"batch.sequences={_nearest(batch.sequences, data_ranks)}")
    if any(entry.sequences % data_ranks for entry in batch.ramp):
        entries = [f"{{tokens: {e.tokens}, sequences: {_nearest(e.sequences, data_ranks)}}}" for e in batch.ramp]
        words.append(shlex.quote(f"batch.ramp=[{', '.join(entries)}]"))
    if streams % data_ranks:
        words.append(f"data.streams={_nearest(streams, data_ranks)}")
    return words


def process_counts(config: RunConfig) -> list[int]:
    """Every number of processes that the mesh's sizes, all global batches and the streams divide by, smallest first."""
    return [count for count in dealt_counts(config) if _runs_on(config, count)]


def dealt_counts(config: RunConfig) -> list[int]:
    """Every number of processes that all global batches and the streams divide by, smallest first, whatever the mesh.

    Each of them has a mesh: copies of the model on all.
    """
    return divisors(math.gcd(*_divided(config).values()))


def _divided(config: RunConfig) -> dict[str, int]:
    """What is dealt over the ranks in equal parts, by key."""
    return _batch_sizes(config) | {"data.streams": config.data.streams}


def _nearest(number: int, divisor: int) -> int:
    """The nearest multiple of a divisor, at least one of it."""
    return max(divisor, round(number / divisor) * divisor)


def _or_processes(config: RunConfig, asked: int) -> str:
    """The nearest few numbers of processes on which the config runs as it is, as the end of a sentence."""
    counts = sorted(sorted(process_counts(config), key=lambda count: abs(count - asked))[:6])
    return f", or start {' or '.join(map(str, counts))} process{'es' * (counts[-1] > 1)}" if counts else ""


def _runs_on(config: RunConfig, world: int) -> bool:
    try:
        mesh_sizes(config.parallel, config.model, world)
    except UserError:
        return False
    return True


def _batch_sizes(config: RunConfig) -> dict[str, int]:
    """Setting → global batch, of each size that the run has."""
    sizes = {"batch.sequences": config.batch.sequences}
    return sizes | {f"batch.ramp[{index}].sequences": entry.sequences for index, entry in enumerate(config.batch.ramp)}
