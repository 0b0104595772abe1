"""The arithmetic of one rank in one step, and the seconds of a step on a GPU: a roofline, each assumption named.

    compute   matrix products, attention's core, each at its share of the peak (ACHIEVED), and what waits for memory:
              PASSES over all that a forward pass makes
    gathers   FSDP's weights and gradients travel beside the computing: the longer of the two counts
    tokens    the expert exchange is taken as not hidden, though the shared expert hides some of it
    update    Newton-Schulz and some passes over the state; what it sends travels beside that

    step = max(compute, gathers) + tokens + update;   MFU = FLOPs of the model (flops_per_token) / step / peak

Beyond the model's products, what recompute does again is done, and flash attention's backward: five products to two.
"""

from typing import NamedTuple

from trinity.config.run import RunConfig
from trinity.hardware import GPU
from trinity.models.flops import flops_per_token
from trinity.optim.muon import Muon
from trinity.optim.newton_schulz import newton_schulz_flops
from trinity.planning.communication import Flow, orthogonalized, seconds
from trinity.planning.stretches import Load

ACHIEVED = {"products": 0.6, "attention": 0.45, "memory": 0.8, "links": 0.8}
"""Share of the data sheet's rate that is reached. Ours, none measured: large kernels on a large GPU come near them."""

PASSES = 5
"""Over all that a forward pass makes: written, read by what follows and in backward, its gradient written and read; two
more where it is computed again. Fused kernels come near that; the torch references take several times as many. Ours."""

UPDATE_PASSES = 3
"""Over parameters, gradients, momentum and moments in an update. Ours."""


class Work(NamedTuple):
    """FLOPs of one rank in one step.

    model: as MFU counts them. products, attention: as done, attention's core apart. newton_schulz: of the update.
    """

    model: float
    products: float
    attention: float
    newton_schulz: float


class Seconds(NamedTuple):
    """Of one step, by what they go to (see the module); gathers, tokens and moved are traffic."""

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
        """Forward and backward passes."""
        return self.products + self.attention + self.memory

    @property
    def computing(self) -> float:
        """All that a GPU would do if it were alone."""
        return self.compute + self.newton_schulz + self.state

    @property
    def update(self) -> float:
        """The optimizers' step."""
        return max(self.newton_schulz + self.state, self.moved)

    @property
    def traffic(self) -> float:
        """All that goes between ranks, hidden or not."""
        return self.gathers + self.tokens + self.moved

    @property
    def step(self) -> float:
        """All of it."""
        return max(self.compute, self.gathers) + self.tokens + self.update


def work_of(config: RunConfig, muon: Muon, load: Load, replicas: int) -> Work:
    """The arithmetic of one rank's part of a step."""
    flops = flops_per_token(config.model, config.data.sequence_length)
    kept = {"none": set(flops), "block": {"head"}, "selective": {"head", "attention core", "routed experts"}}
    again = {part for part in flops if part not in {"total", "training", *kept[config.recompute]}}
    times = {part: 3 + (part in again) for part in flops}
    products = sum(times[part] * flops[part] for part in flops if part not in ("attention core", "total", "training"))
    attention = (times["attention core"] + 0.5) * flops["attention core"]
    numbers = (flops["training"], products, attention)
    return Work(*(load.tokens * number for number in numbers), _newton_schulz(muon, replicas))


def _newton_schulz(muon: Muon, replicas: int) -> float:
    flops = 0.0
    for batch in muon.batches:
        matrices, shared = orthogonalized(muon, batch, replicas)
        mine = -(-matrices // replicas) if shared else matrices
        flops += mine * newton_schulz_flops(*batch.shape, muon.steps)
    return flops


def seconds_of(config: RunConfig, work: Work, flows: list[Flow], made: float, state: float, gpu: GPU) -> Seconds:
    """The roofline of a step.

    Args:
        flows: all of the step.
        made: bytes that the forward passes of the step make and would keep without recompute.
        state: bytes of parameters, gradients, momentum and moments.
    """
    peak = gpu.bf16 if config.precision.compute == "bfloat16" else gpu.fp32
    update = gpu.bf16 if config.optim.muon.dtype == "bfloat16" else gpu.fp32
    bandwidth = ACHIEVED["memory"] * gpu.bandwidth
    passes = PASSES + (2 if config.recompute != "none" else 0)
    travel = dict.fromkeys(("passes", "exchange", "update"), 0.0)
    for flow in flows:
        travel[flow.phase] += seconds(flow, gpu, ACHIEVED["links"])
    return Seconds(
        products=work.products / (ACHIEVED["products"] * peak),
        attention=work.attention / (ACHIEVED["attention"] * peak),
        memory=passes * made / bandwidth,
        gathers=travel["passes"],
        tokens=travel["exchange"],
        newton_schulz=work.newton_schulz / (ACHIEVED["products"] * update),
        state=UPDATE_PASSES * state / bandwidth,
        moved=travel["update"],
    )
