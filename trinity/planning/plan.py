"""Estimate memory, compute, communication and step time of a run, for each batch size and sequence length it has.

All estimates are for rank 0 and take seconds on any machine. README.md says what is exact and what is estimated.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from trinity.config.run import RunConfig
from trinity.errors import UserError
from trinity.hardware import GPU, GPUS
from trinity.models.flops import flops_per_token, parameter_counts
from trinity.parallel.mesh import Sizes, mesh_sizes
from trinity.planning.activations import Activations, block_activations, embedding_activations, head_activations
from trinity.planning.communication import Flow, communication_flows
from trinity.planning.fake_rank import FakeRank, fake_rank, state_bytes
from trinity.planning.memory import Memory, peak_moment, unreduced_gradients
from trinity.planning.mesh_search import (
    check_batches_for_any_mesh,
    check_gpu_count,
    check_gpus,
    mesh_candidates,
    min_gpus,
    min_state_bytes,
)
from trinity.planning.roofline import Microbatch, StepSeconds, StepWork, estimate_microbatch, step_seconds, step_work
from trinity.planning.schedule_segments import RankLoad, ScheduleSegment, rank_load, schedule_segments
from trinity.planning.step_terms import PRESENT, Implementation

USABLE_SHARE = 0.92
"""Share of a GPU's memory that tensors may take; fragmentation, CUDA and NCCL take the rest. Not from the report:
assumed."""

SHARD_COUNTS_TRIED = 3
"""The mesh search takes the fastest mesh of this many shard counts that fit, smallest first. Not from the report."""

ActivationCache = dict[tuple, list[Activations]]
"""Measured blocks by (recompute, microbatch, length, expert and context ranks); plans on several meshes share it."""


@dataclass(frozen=True)
class StepEstimate:
    """A step of rank 0 in one segment of the schedule.

    flops: per token, from trinity.models.flops. deferred: gradients are reduced once a step, not every microbatch.
    memory: at its peak. flows: the step's collectives. microbatch: where the time of one microbatch goes.
    """

    segment: ScheduleSegment
    load: RankLoad
    flops: dict[str, float]
    deferred: bool
    memory: Memory
    work: StepWork
    flows: list[Flow]
    microbatch: Microbatch
    seconds: StepSeconds

    @property
    def total_seconds(self) -> float:
        """Seconds of all steps of the segment."""
        return self.segment.steps * self.seconds.step


@dataclass(frozen=True)
class Plan:
    """The plan of a run on `gpus` GPUs of one kind.

    config: includes the planned mesh. picked: settings of the mesh that replaces the config's, if that does not fit
    the number of GPUs; refusal: why it does not. parameters: counts from trinity.models.flops. state: bytes on rank 0
    that do not depend on the batch. steps: one for each segment of the schedule, in order. implementation: the costs
    beside the model's arithmetic that the plan counts.
    """

    config: RunConfig
    gpus: int
    card: GPU
    sizes: Sizes
    parameters: dict[str, int]
    state: dict[str, int]
    steps: list[StepEstimate]
    picked: list[str] = field(default_factory=list)
    refusal: str = ""
    implementation: Implementation = PRESENT
    cache: ActivationCache = field(default_factory=dict, repr=False)

    @property
    def gpu(self) -> str:
        """Name of the GPU."""
        return self.card.name

    @property
    def peak_step(self) -> StepEstimate:
        """The step of the segment that needs the most memory."""
        return max(self.steps, key=lambda step: step.memory.total)

    @property
    def longest_step(self) -> StepEstimate:
        """The step of the segment that takes the most time."""
        return max(self.steps, key=lambda step: step.total_seconds)

    @property
    def memory(self) -> Memory:
        """Peak memory of the run."""
        return self.peak_step.memory

    @property
    def fits(self) -> bool:
        """Whether peak memory is within the usable share of the GPU's memory."""
        return fits(self.memory, self.card)

    @property
    def total_seconds(self) -> float:
        """Seconds of all steps of the run, without checkpoints, evaluation and restarts."""
        return sum(step.total_seconds for step in self.steps)

    def mfu(self, step: StepEstimate) -> float:
        """Model FLOPs of a step over the GPU's peak bf16 FLOPs in the step's time."""
        return step.work.model / step.seconds.step / self.card.bf16

    def tokens_per_second(self, step: StepEstimate) -> float:
        """Tokens per second of one GPU."""
        return step.load.tokens / step.seconds.step


def fits(memory: Memory, card: GPU) -> bool:
    """Whether peak memory is within the usable share of the GPU's memory."""
    return memory.total <= USABLE_SHARE * card.memory


def make_plan(
    config: RunConfig,
    gpus: int | None = None,
    gpu: str | GPU = "h200",
    pick: bool = False,
    implementation: Implementation = PRESENT,
) -> Plan:
    """Plan a run. The calling process must not be in a process group.

    Args:
        gpus: number of GPUs; default: the product of the mesh's fixed sizes.
        gpu: a name in trinity.hardware.GPUS, or a GPU.
        pick: if the config's mesh does not fit `gpus`, plan the fastest mesh found that fits in memory.
        implementation: costs beside the model's arithmetic; another one than the present code's, to compare.
    Raises:
        UserError: the config does not run on `gpus`; with pick, its batches or streams do not divide by `gpus`.
    """
    card = GPUS[gpu] if isinstance(gpu, str) else gpu
    gpus = min_gpus(config) if gpus is None else gpus
    check_gpu_count(gpus)
    if pick:
        check_batches_for_any_mesh(config, gpus)
        try:
            mesh_sizes(config.parallel, config.model, gpus)
        except UserError as error:
            return replace(_pick_mesh(config, gpus, card, implementation), refusal=str(error))
    return _plan_for_mesh(config, gpus, card, {}, implementation)


def replan(plan: Plan, config: RunConfig, gpus: int) -> Plan:
    """Plan a changed config on the same kind of GPU, with the measurements of `plan`.

    Raises:
        UserError: the config does not run on `gpus`.
    """
    return _plan_for_mesh(config, gpus, plan.card, plan.cache, plan.implementation)


def peak_memory(config: RunConfig, gpus: int, card: GPU, cache: ActivationCache | None = None) -> Memory:
    """Peak memory of a run, without the rest of the plan: a third of its time.

    Raises:
        UserError: the config does not run on `gpus`.
    """
    cache = {} if cache is None else cache
    with fake_rank(config, check_gpus(config, gpus)) as rank:
        peaks = [_memory(at, rank, load, card, cache)[0] for at, _, load in _segment_loads(config, gpus)]
    return max(peaks, key=lambda memory: memory.total)


def _pick_mesh(config: RunConfig, gpus: int, card: GPU, implementation: Implementation) -> Plan:
    """The plan of the fastest mesh that fits in memory; if none fits, of the one that needs the least.

    More shards need less memory, fewer communicate less. The largest number is planned first and measures the
    activations; then the others in ascending order, if state and those activations may fit.
    """
    cache: ActivationCache = {}

    def plans_of(candidates: list[tuple[list[str], RunConfig]]) -> list[Plan]:
        return [
            replace(_plan_for_mesh(changed, gpus, card, cache, implementation), picked=words)
            for words, changed in candidates
        ]

    candidates = mesh_candidates(config, gpus, card)
    plans = plans_of(candidates.pop(max(candidates)))
    if not any(plan.fits for plan in plans):
        return min(plans, key=lambda plan: plan.memory.total)
    room = USABLE_SHARE * card.memory - min(plan.memory.parts.get("activations", 0) for plan in plans)
    sizes_that_fit = 0
    for shard, meshes_of_shard in candidates.items():
        if min_state_bytes(config) / shard <= room and sizes_that_fit < SHARD_COUNTS_TRIED:
            shard_plans = plans_of(meshes_of_shard)
            sizes_that_fit += any(plan.fits for plan in shard_plans)
            plans += shard_plans
    fitting = [plan for plan in plans if plan.fits]
    return min(fitting, key=lambda plan: plan.total_seconds or plan.longest_step.seconds.step)


def _plan_for_mesh(
    config: RunConfig, gpus: int, card: GPU, cache: ActivationCache, implementation: Implementation
) -> Plan:
    sizes = check_gpus(config, gpus)
    with fake_rank(config, sizes) as rank:
        state = state_bytes(rank.model, rank.optimizers)
        steps = [
            _estimate_step(at, rank, segment, load, card, state, cache, implementation)
            for at, segment, load in _segment_loads(config, gpus)
        ]
    return Plan(
        config,
        gpus,
        card,
        sizes,
        parameter_counts(config.model),
        state,
        steps,
        implementation=implementation,
        cache=cache,
    )


def _segment_loads(config: RunConfig, gpus: int) -> Iterator[tuple[RunConfig, ScheduleSegment, RankLoad]]:
    """Each segment with the config at its sequence length, and rank 0's load."""
    for segment in schedule_segments(config):
        at_length = replace(config, data=replace(config.data, sequence_length=segment.sequence_length))
        yield at_length, segment, rank_load(config, segment, gpus)


def _estimate_step(
    config: RunConfig,
    rank: FakeRank,
    segment: ScheduleSegment,
    load: RankLoad,
    card: GPU,
    state: dict[str, int],
    cache: ActivationCache,
    implementation: Implementation,
) -> StepEstimate:
    blocks = _blocks(config, rank, load, cache)
    memory, deferred = _memory(config, rank, load, card, cache)
    contexts = [block.context for block in blocks if block.context is not None]
    flows = communication_flows(config, rank, load, [block.exchange for block in blocks], deferred, contexts)
    work = step_work(config, rank.optimizers.muon, load, rank.ranks.sizes.replicate)
    microbatch = estimate_microbatch(config, rank, load, deferred, card, implementation)
    flops = flops_per_token(config.model, config.data.sequence_length)
    seconds = step_seconds(config, load.microbatches, microbatch, work, flows, state, card)
    return StepEstimate(segment, load, flops, deferred, memory, work, flows, microbatch, seconds)


def _blocks(config: RunConfig, rank: FakeRank, load: RankLoad, cache: ActivationCache) -> list[Activations]:
    sizes = rank.ranks.sizes
    key = (config.recompute, load.microbatch, config.data.sequence_length, sizes.expert, sizes.context)
    if key not in cache:
        cache[key] = block_activations(config, rank.ranks, load.microbatch)
    return cache[key]


def _memory(
    config: RunConfig, rank: FakeRank, load: RankLoad, card: GPU, cache: ActivationCache
) -> tuple[Memory, bool]:
    """Peak memory of a step, and whether gradients are reduced once a step."""
    blocks = _blocks(config, rank, load, cache)
    embedding, head = embedding_activations(config, load.microbatch), head_activations(config, load.microbatch)
    unreduced = unreduced_gradients(rank, config.parallel.defer_reduce, load.microbatches, card.memory)
    return peak_moment(rank, [embedding, *blocks, head], load.microbatches, unreduced), unreduced > 0
