"""What is wrong with a plan: that it does not fit, with the first change that mends it, or that GPUs wait for links."""

from collections.abc import Iterator
from dataclasses import replace

from trinity.config.run import RunConfig
from trinity.errors import UserError
from trinity.planning.gpus import gpus_that_run
from trinity.planning.memory import Memory
from trinity.planning.plan import Plan, Step, fullest_moment
from trinity.training.hardware import GPUS

USABLE = 0.92
"""Share of a GPU's memory that tensors may take; the rest is the allocator's gaps, CUDA's and NCCL's. Ours."""


def fits(memory: Memory, gpu: str) -> bool:
    """Whether the fullest moment of a run leaves enough of the GPU's memory to others."""
    return memory.total <= USABLE * GPUS[gpu].memory


def warnings(plan: Plan) -> list[str]:
    """A sentence for everything that is wrong, with what would mend it; none for a good plan."""
    found = []
    if not fits(plan.memory, plan.gpu):
        most = USABLE * plan.card.memory
        found.append(
            f"it does not fit: {plan.memory.total / 1e9:.1f} GB at the fullest moment, and a {plan.gpu} has "
            f"{most / 1e9:.1f} GB for tensors; {_mend(plan)}"
        )
    return found + [_waiting(step) for step in plan.steps if step.seconds.traffic > step.seconds.computing]


def _waiting(step: Step) -> str:
    rows, microbatches = step.load.rows, step.load.microbatches
    often = f"; batch.microbatch={rows} would gather weights once a step in place of {microbatches} times"
    took = f"{step.seconds.traffic:.3g} s to {step.seconds.computing:.3g} s"
    which = f"in a step of {step.stretch.sequences} sequences"
    return f"traffic takes longer than computing, {took} {which}{often if microbatches > 1 else ''}"


def _mend(plan: Plan) -> str:
    for words, config, gpus in _alternatives(plan.config, plan.gpus):
        try:
            memory = fullest_moment(config, gpus, plan.gpu)
        except UserError:  # these sizes do not divide
            continue
        if fits(memory, plan.gpu):
            return f"{' '.join(words)} would, with {memory.total / 1e9:.1f} GB"
    return "neither recompute nor smaller microbatches nor more shards would"


def _alternatives(config: RunConfig, gpus: int) -> Iterator[tuple[list[str], RunConfig, int]]:
    """Changes that save memory, those that cost least first: words, the changed config, the GPUs it is for."""
    for words, changed in _leaner(config):
        yield words, changed, gpus
    leanest = _leaner(config)[-1:]
    for before, start in [([], config), *leanest]:
        for factor in (2, 4, 8):
            shard = config.parallel.shard * factor
            if config.parallel.shard > 0 and config.parallel.replicate == -1:
                parallel = replace(config.parallel, shard=shard)
                yield [*before, f"parallel.shard={shard}"], replace(start, parallel=parallel), gpus
        for more in [number for number in gpus_that_run(config) if number > gpus][:3]:
            if config.parallel.shard == -1:
                yield [*before, f"--gpus {more}"], start, more


def _leaner(config: RunConfig) -> list[tuple[list[str], RunConfig]]:
    """More recompute, then smaller microbatches with it."""
    kinds = ["none", "selective", "block"]
    stronger = kinds[kinds.index(config.recompute) + 1 :]
    found = [([f"recompute={kind}"], replace(config, recompute=kind)) for kind in stronger]
    words, most = ([f"recompute={kinds[-1]}"] if stronger else []), config.batch.microbatch
    while most > 1:
        most //= 2
        batch = replace(config.batch, microbatch=most)
        found.append(([*words, f"batch.microbatch={most}"], replace(config, recompute=kinds[-1], batch=batch)))
    return found
