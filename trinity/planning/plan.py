"""A run on a cluster before there is one: what a GPU holds, does and says in a step, and how long that takes.

Everything is worked out for rank 0, on this machine, in seconds. README.md says what is exact and what is estimated.
"""

from dataclasses import dataclass, replace

from trinity.config.run import RunConfig
from trinity.models.accounting import flops_per_token, parameter_counts
from trinity.parallel.mesh import Sizes
from trinity.planning.activations import Activations, block_activations, embedding_activations, head_activations
from trinity.planning.communication import Flow, flows
from trinity.planning.gpus import check_gpus, gpus_needed
from trinity.planning.length import Load, Stretch, load_of, stretches
from trinity.planning.memory import Memory, fullest, unreduced_gradients
from trinity.planning.sharded import Sharded, sharded, state_bytes
from trinity.planning.work import Seconds, Work, seconds_of, work_of
from trinity.training.hardware import GPU, GPUS


@dataclass(frozen=True)
class Step:
    """A step of rank 0 in one stretch of the run, in which the global batch has one size.

    load: its rows. deferred: whether gradients are reduced once a step. memory: at the fullest moment.
    """

    stretch: Stretch
    load: Load
    deferred: bool
    memory: Memory
    work: Work
    flows: list[Flow]
    seconds: Seconds


@dataclass(frozen=True)
class Plan:
    """A run on so many GPUs of a kind.

    parameters, flops: as trinity.models.accounting has them. state: bytes of rank 0, whatever the batch.
    steps: one for each size of the global batch, in order.
    """

    config: RunConfig
    gpus: int
    gpu: str
    sizes: Sizes
    parameters: dict[str, int]
    flops: dict[str, float]
    state: dict[str, int]
    steps: list[Step]

    @property
    def card(self) -> GPU:
        """What the GPU can do."""
        return GPUS[self.gpu]

    @property
    def memory(self) -> Memory:
        """The fullest moment of the run."""
        return max((step.memory for step in self.steps), key=lambda memory: memory.total)

    def mfu(self, step: Step) -> float:
        """Model FLOPs of a step over what the GPU could do in that time in bf16."""
        return step.work.model / step.seconds.step / self.card.bf16

    def tokens_per_second(self, step: Step) -> float:
        """Of one GPU."""
        return step.load.tokens / step.seconds.step


def make_plan(config: RunConfig, gpus: int | None = None, gpu: str = "h200") -> Plan:
    """The plan of a run; call it in a process that is in no process group.

    Args:
        gpus: how many; by default what the config's fixed sizes make.
        gpu: a name in trinity.training.hardware.GPUS.
    Raises:
        UserError: the config does not run on so many.
    """
    gpus = gpus_needed(config) if gpus is None else gpus
    sizes = check_gpus(config, gpus)
    with sharded(config, sizes) as rank:
        steps = [_step(config, rank, stretch, GPUS[gpu]) for stretch in _stretches(config)]
        state = state_bytes(rank.model, rank.optimizers)
    parameters = parameter_counts(config.model)
    flops = flops_per_token(config.model, config.data.sequence_length)
    return Plan(config, gpus, gpu, sizes, parameters, flops, state, steps)


def fullest_moment(config: RunConfig, gpus: int, gpu: str) -> Memory:
    """The memory of a plan alone, which takes a third of the time.

    Raises:
        UserError: the config does not run on so many GPUs.
    """
    with sharded(config, check_gpus(config, gpus)) as rank:
        loads = {load_of(config, stretch.sequences, gpus) for stretch in _stretches(config)}
        found = [_memory(config, rank, load, _blocks(config, rank, load), GPUS[gpu])[0] for load in loads]
    return max(found, key=lambda memory: memory.total)


def _stretches(config: RunConfig) -> list[Stretch]:
    """Of the run; a run of no steps has a batch nevertheless."""
    return stretches(config) or [Stretch(0, 0, config.batch.sequences, 0)]


def _step(config: RunConfig, rank: Sharded, stretch: Stretch, gpu: GPU) -> Step:
    load = load_of(config, stretch.sequences, rank.ranks.world)
    blocks = _blocks(config, rank, load)
    memory, deferred = _memory(config, rank, load, blocks, gpu)
    spoken = flows(config, rank, load, [block.exchange for block in blocks], deferred)
    work = work_of(config, rank.optimizers.muon, load, rank.ranks.sizes.replicate)
    made = load.microbatches * sum(block.kept for block in _blocks(replace(config, recompute="none"), rank, load))
    state = sum(state_bytes(rank.model, rank.optimizers).values())
    return Step(stretch, load, deferred, memory, work, spoken, seconds_of(config, work, spoken, made, state, gpu))


def _blocks(config: RunConfig, rank: Sharded, load: Load) -> list[Activations]:
    return block_activations(config, rank.ranks, load.microbatch)


def _memory(config: RunConfig, rank: Sharded, load: Load, blocks: list[Activations], gpu: GPU) -> tuple[Memory, bool]:
    """The fullest moment of a step, and whether gradients are reduced once in it."""
    embedding, head = embedding_activations(config, load.microbatch), head_activations(config, load.microbatch)
    unreduced = unreduced_gradients(rank, config.parallel.defer_reduce, load.microbatches, gpu.memory)
    return fullest(rank, [embedding, *blocks, head], load.microbatches, unreduced), unreduced > 0
