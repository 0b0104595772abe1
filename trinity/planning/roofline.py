"""FLOPs of one rank in a step, and the seconds of the step on a GPU by a roofline model.

    compute   matrix products and attention's core, each at its share of the peak (ACHIEVED), plus memory-bound work:
              PASSES over everything the forward pass produces
    gathers   FSDP's gathers and reductions; they overlap with compute, so the longer of the two counts
    tokens    the expert exchange; assumed not to overlap, though the shared expert hides some of it
    update    Newton-Schulz and UPDATE_PASSES over the state; Muon's communication overlaps with them

    step = max(compute, gathers) + tokens + update;   MFU = FLOPs of the model (flops_per_token) / step / peak

FLOPs include what activation checkpointing recomputes, and flash attention's backward: five products for two forward.
"""

from typing import NamedTuple

from trinity.config.run import RunConfig
from trinity.hardware import GPU
from trinity.models.flops import flops_per_token
from trinity.optim.muon import Muon
from trinity.optim.newton_schulz import newton_schulz_flops
from trinity.planning.communication import Flow, flow_seconds, matrices_per_rank
from trinity.planning.schedule_segments import RankLoad

ACHIEVED = {"products": 0.6, "attention": 0.45, "memory": 0.8, "links": 0.8}
"""Share of the data sheet's rate that is reached. Not from the report and not measured: large kernels on a large GPU
come near them."""

PASSES = 5
"""Passes over everything the forward pass produces: write, read by the next operation, read in backward, write and read
of its gradient; two more with recompute. Not from the report: fused kernels come near it, the torch references take
several times as many."""

UPDATE_PASSES = 3
"""Passes over parameters, gradients, momentum and moments in an update. Not from the report."""


class StepWork(NamedTuple):
    """FLOPs of one rank in one step.

    model: as MFU counts them. products, attention: as executed, matrix products and attention's core. newton_schulz:
    of the update.
    """

    model: float
    products: float
    attention: float
    newton_schulz: float


class StepSeconds(NamedTuple):
    """Seconds of one step by kind of work (see the module); gathers, tokens and moved are communication.

    memory: activations read and written. state: the same for the optimizer's state. moved: the update's communication.
    """

    products: float
    attention: float
    memory: float
    gathers: float
    tokens: float
    newton_schulz: float
    state: float
    moved: float

    @property
    def compute(self) -> float:
        """Forward and backward passes without communication."""
        return self.products + self.attention + self.memory

    @property
    def computing(self) -> float:
        """The step without any communication."""
        return self.compute + self.newton_schulz + self.state

    @property
    def update(self) -> float:
        """The optimizers' step."""
        return max(self.newton_schulz + self.state, self.moved)

    @property
    def traffic(self) -> float:
        """All communication, overlapped or not."""
        return self.gathers + self.tokens + self.moved

    @property
    def step(self) -> float:
        """The whole step."""
        return max(self.compute, self.gathers) + self.tokens + self.update


def step_work(config: RunConfig, muon: Muon, load: RankLoad, replicas: int) -> StepWork:
    """FLOPs of one rank's share of a step; `replicas` replicas of the model may share Newton-Schulz."""
    flops = flops_per_token(config.model, config.data.sequence_length)
    kept = {"none": set(flops), "block": {"head"}, "selective": {"head", "attention core", "routed experts"}}
    recomputed = {part for part in flops if part not in {"total", "training", *kept[config.recompute]}}
    times = {part: 3 + (part in recomputed) for part in flops}
    products = sum(times[part] * flops[part] for part in flops if part not in ("attention core", "total", "training"))
    attention = (times["attention core"] + 0.5) * flops["attention core"]
    return StepWork(
        model=load.tokens * flops["training"],
        products=load.tokens * products,
        attention=load.tokens * attention,
        newton_schulz=_newton_schulz(muon, replicas),
    )


def _newton_schulz(muon: Muon, replicas: int) -> float:
    flops = 0.0
    for batch in muon.batches:
        matrices, shared = matrices_per_rank(muon, batch, replicas)
        computed = -(-matrices // replicas) if shared else matrices
        flops += computed * newton_schulz_flops(*batch.shape, muon.steps)
    return flops


def step_seconds(
    config: RunConfig, work: StepWork, flows: list[Flow], produced: float, state: float, gpu: GPU
) -> StepSeconds:
    """Seconds of a step by the roofline model.

    Args:
        flows: all of the step's collectives.
        produced: bytes of activations that the step's forward passes produce, all that are saved without recompute.
        state: bytes of parameters, gradients, momentum and moments.
    """
    peak = gpu.bf16 if config.precision.compute == "bfloat16" else gpu.fp32
    update_peak = gpu.bf16 if config.optim.muon.dtype == "bfloat16" else gpu.fp32
    bandwidth = ACHIEVED["memory"] * gpu.bandwidth
    passes = PASSES + (2 if config.recompute != "none" else 0)
    communication = dict.fromkeys(("passes", "exchange", "update"), 0.0)
    for flow in flows:
        communication[flow.phase] += flow_seconds(flow, gpu, ACHIEVED["links"])
    return StepSeconds(
        products=work.products / (ACHIEVED["products"] * peak),
        attention=work.attention / (ACHIEVED["attention"] * peak),
        memory=passes * produced / bandwidth,
        gathers=communication["passes"],
        tokens=communication["exchange"],
        newton_schulz=work.newton_schulz / (ACHIEVED["products"] * update_peak),
        state=UPDATE_PASSES * state / bandwidth,
        moved=communication["update"],
    )
