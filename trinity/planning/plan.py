"""Estimate memory, compute, communication and step time of a run, for each batch size and sequence length it has.

Everything is worked out for rank 0, on this machine, in seconds. README.md says what is exact and what is estimated.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from trinity.config.run import RunConfig
from trinity.errors import UserError
from trinity.hardware import GPU, GPUS
from trinity.models.flops import flops_per_token, parameter_counts
from trinity.parallel.mesh import Sizes, mesh_sizes
from trinity.planning.activations import Activations, block_activations, embedding_activations, head_activations
from trinity.planning.communication import Flow, flows
from trinity.planning.fake_rank import Sharded, sharded, state_bytes
from trinity.planning.gpus import (
    check_batches_for_any_mesh,
    check_count,
    check_gpus,
    gpus_needed,
    least_state,
    mesh_candidates,
)
from trinity.planning.memory import Memory, fullest, unreduced_gradients
from trinity.planning.roofline import Seconds, Work, seconds_of, work_of
from trinity.planning.stretches import Load, Stretch, load_of, stretches

USABLE = 0.92
"""Share of a GPU's memory that tensors may take; the rest is the allocator's gaps, CUDA's and NCCL's. Not from the
report: an assumption."""

SIZES_TRIED = 3
"""Numbers of shards that fit, smallest first, of which the fastest mesh is taken."""

Measured = dict[tuple, list[Activations]]
"""Blocks that were measured, by what they depend on: plans of one config on several meshes share them."""


@dataclass(frozen=True)
class Step:
    """A step of rank 0 in one stretch of the run, in which global batch and sequence length stay the same.

    load: its rows. flops: per token, as trinity.models.accounting has them. deferred: whether gradients are reduced
    once a step. memory: at the fullest moment.
    """

    stretch: Stretch
    load: Load
    flops: dict[str, float]
    deferred: bool
    memory: Memory
    work: Work
    flows: list[Flow]
    seconds: Seconds

    @property
    def total_seconds(self) -> float:
        """Of all steps of the stretch."""
        return self.stretch.steps * self.seconds.step


@dataclass(frozen=True)
class Plan:
    """A run on a number of GPUs of a kind.

    config: with the mesh that is planned. picked: the settings that changed its mesh, where it could not be laid over
    the GPUs. refusal: why it could not. parameters: as trinity.models.accounting has them. state: bytes of rank 0,
    whatever the batch. steps: one for each batch size and sequence length, in order.
    """

    config: RunConfig
    gpus: int
    card: GPU
    sizes: Sizes
    parameters: dict[str, int]
    state: dict[str, int]
    steps: list[Step]
    picked: list[str] = field(default_factory=list)
    refusal: str = ""
    measured: Measured = field(default_factory=dict, repr=False)

    @property
    def gpu(self) -> str:
        """Name of the GPU."""
        return self.card.name

    @property
    def worst(self) -> Step:
        """A step of the stretch that needs the most memory."""
        return max(self.steps, key=lambda step: step.memory.total)

    @property
    def main(self) -> Step:
        """A step of the stretch that takes the most time."""
        return max(self.steps, key=lambda step: step.total_seconds)

    @property
    def memory(self) -> Memory:
        """The fullest moment of the run."""
        return self.worst.memory

    @property
    def fits(self) -> bool:
        """Whether the fullest moment leaves enough of the GPU's memory to others."""
        return fits(self.memory, self.card)

    @property
    def total_seconds(self) -> float:
        """Of all steps of the run; saving, evaluation and stops are not in it."""
        return sum(step.total_seconds for step in self.steps)

    def mfu(self, step: Step) -> float:
        """Model FLOPs of a step over what the GPU could do in that time in bf16."""
        return step.work.model / step.seconds.step / self.card.bf16

    def tokens_per_second(self, step: Step) -> float:
        """Of one GPU."""
        return step.load.tokens / step.seconds.step


def fits(memory: Memory, card: GPU) -> bool:
    """Whether the fullest moment of a run leaves enough of the GPU's memory to others."""
    return memory.total <= USABLE * card.memory


def make_plan(config: RunConfig, gpus: int | None = None, gpu: str | GPU = "h200", pick: bool = False) -> Plan:
    """The plan of a run; call it in a process that is in no process group.

    Args:
        gpus: how many; by default what the config's fixed sizes make.
        gpu: a name in trinity.hardware.GPUS, or what the GPU can do.
        pick: where the config's mesh cannot be laid over the GPUs, plan the fastest one found that fits in memory.
    Raises:
        UserError: the config does not run on that many; with pick, its batches or streams do not divide by them.
    """
    card = GPUS[gpu] if isinstance(gpu, str) else gpu
    gpus = gpus_needed(config) if gpus is None else gpus
    check_count(gpus)
    if pick:
        check_batches_for_any_mesh(config, gpus)
        try:
            mesh_sizes(config.parallel, config.model, gpus)
        except UserError as error:
            return replace(_picked(config, gpus, card), refusal=str(error))
    return _planned(config, gpus, card, {})


def replanned(plan: Plan, config: RunConfig, gpus: int) -> Plan:
    """The plan of a changed config on the same kind of GPU.

    Raises:
        UserError: the config does not run on that many GPUs.
    """
    return _planned(config, gpus, plan.card, plan.measured)


def fullest_moment(config: RunConfig, gpus: int, card: GPU, measured: Measured | None = None) -> Memory:
    """The memory of a plan alone, which takes a third of the time.

    Raises:
        UserError: the config does not run on that many GPUs.
    """
    measured = {} if measured is None else measured
    with sharded(config, check_gpus(config, gpus)) as rank:
        found = [_memory(own, rank, load, card, measured)[0] for own, _, load in _loads(config, gpus)]
    return max(found, key=lambda memory: memory.total)


def _picked(config: RunConfig, gpus: int, card: GPU) -> Plan:
    """The fastest of the meshes that fit, or the one that needs the least memory.

    Most shards need the least memory, fewest send the least. So the largest number is planned first, which measures the
    activations; then, from the smallest on, those that leave room for as many.
    """
    measured: Measured = {}

    def plans_of(candidates: list[tuple[list[str], RunConfig]]) -> list[Plan]:
        return [replace(_planned(own, gpus, card, measured), picked=words) for words, own in candidates]

    candidates = mesh_candidates(config, gpus, card)
    plans = plans_of(candidates.pop(max(candidates)))
    if not any(plan.fits for plan in plans):
        return min(plans, key=lambda plan: plan.memory.total)
    room = USABLE * card.memory - min(plan.memory.parts.get("activations", 0) for plan in plans)
    sizes_that_fit = 0
    for shard, tried in candidates.items():
        if least_state(config) / shard <= room and sizes_that_fit < SIZES_TRIED:
            more = plans_of(tried)
            sizes_that_fit += any(plan.fits for plan in more)
            plans += more
    fitting = [plan for plan in plans if plan.fits]
    return min(fitting, key=lambda plan: plan.total_seconds or plan.main.seconds.step)


def _planned(config: RunConfig, gpus: int, card: GPU, measured: Measured) -> Plan:
    sizes = check_gpus(config, gpus)
    with sharded(config, sizes) as rank:
        state = state_bytes(rank.model, rank.optimizers)
        whole = sum(state.values())
        steps = [_step(own, rank, stretch, load, card, whole, measured) for own, stretch, load in _loads(config, gpus)]
    return Plan(config, gpus, card, sizes, parameter_counts(config.model), state, steps, measured=measured)


def _loads(config: RunConfig, gpus: int) -> Iterator[tuple[RunConfig, Stretch, Load]]:
    """Every stretch with the config as it is in it, its sequence length being that of its phase."""
    for stretch in stretches(config):
        own = replace(config, data=replace(config.data, sequence_length=stretch.sequence_length))
        yield own, stretch, load_of(config, stretch, gpus)


def _step(
    config: RunConfig, rank: Sharded, stretch: Stretch, load: Load, card: GPU, state: int, measured: Measured
) -> Step:
    blocks = _blocks(config, rank, load, measured)
    memory, deferred = _memory(config, rank, load, card, measured)
    spoken = flows(config, rank, load, [block.exchange for block in blocks], deferred)
    work = work_of(config, rank.optimizers.muon, load, rank.ranks.sizes.replicate)
    whole = _blocks(replace(config, recompute="none"), rank, load, measured)
    made = load.microbatches * sum(block.kept for block in whole)
    flops = flops_per_token(config.model, config.data.sequence_length)
    seconds = seconds_of(config, work, spoken, made, state, card)
    return Step(stretch, load, flops, deferred, memory, work, spoken, seconds)


def _blocks(config: RunConfig, rank: Sharded, load: Load, measured: Measured) -> list[Activations]:
    key = (config.recompute, load.microbatch, config.data.sequence_length, rank.ranks.sizes.expert)
    if key not in measured:
        measured[key] = block_activations(config, rank.ranks, load.microbatch)
    return measured[key]


def _memory(config: RunConfig, rank: Sharded, load: Load, card: GPU, measured: Measured) -> tuple[Memory, bool]:
    """The fullest moment of a step, and whether gradients are reduced once in it."""
    blocks = _blocks(config, rank, load, measured)
    embedding, head = embedding_activations(config, load.microbatch), head_activations(config, load.microbatch)
    unreduced = unreduced_gradients(rank, config.parallel.defer_reduce, load.microbatches, card.memory)
    return fullest(rank, [embedding, *blocks, head], load.microbatches, unreduced), unreduced > 0
