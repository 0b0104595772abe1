"""FLOPs of one rank in a step, and the seconds of the step on a GPU by a roofline model.

    compute   all terms of all microbatches: the model's parts (step_terms.py) and FSDP2's copies (step_overheads.py)
    host      its launches run ahead of the device, so the longer of the two counts. With waits for the sizes of an
              exchange, that holds for forward and backward each, and the device is idle after each wait (`waits`)
    gathers   FSDP's gathers and reductions; they overlap with compute, so the longer of the two counts
    tokens    the exchanges of experts, of which the shared expert hides some, and of context parallelism; assumed not
              to overlap
    update    clipping, Newton-Schulz and the optimizers' passes over the state; Muon's communication overlaps with them

    step = max(compute, gathers, host) + tokens + waits + update;  MFU = model's FLOPs (flops_per_token) / step / peak

All seconds are predictions; no run has been measured. The FLOPs of StepWork include what activation checkpointing
recomputes, and flash attention's backward: five products for two forward.
"""

from typing import NamedTuple

import torch

from trinity.config.run import RunConfig
from trinity.hardware import GPU
from trinity.models.flops import flops_per_token
from trinity.optim.muon import Muon
from trinity.optim.newton_schulz import newton_schulz_flops
from trinity.planning.communication import Flow, flow_seconds, matrices_per_rank
from trinity.planning.fake_rank import FakeRank
from trinity.planning.schedule_segments import RankLoad
from trinity.planning.step_overheads import copy_terms, host_seconds, wait_seconds
from trinity.planning.step_terms import (
    PRESENT,
    SHARES,
    Implementation,
    Term,
    memory_rate,
    model_terms,
    recomputed_parts,
)

LINKS = 0.8
"""Share of the links' rates that is reached. Not from the report and not measured."""

MUON_PASSES, ADAMW_PASSES = 29, 10
"""Passes over a parameter in fp32, 4 bytes each, counted in the code. Both: 1 for the norm, 2 to clip. AdamW, fused: 7.
Muon: momentum 5, decay 2, starved experts 2, Nesterov 7, to bf16 and back around Newton-Schulz 5, update 5."""

NEWTON_SCHULZ_BYTES = 33
"""Bytes that five steps read and write per element of a matrix, in the Gram form; its time is the longer of these and
its FLOPs."""


class Microbatch(NamedTuple):
    """Seconds of one microbatch of one rank.

    terms: of the device, which add up. host: of the host, in forward and backward. waits: the device is idle after
    waits for the sizes of an exchange; 0 if there are none.
    """

    terms: list[Term]
    host: tuple[float, float]
    waits: float

    @property
    def device(self) -> float:
        """All terms."""
        return sum(term.seconds for term in self.terms)

    @property
    def host_exposed(self) -> float:
        """What waits cost: the device's idle time, and the host's lead, lost between forward and backward."""
        if not self.waits:
            return 0.0
        forward = sum(term.forward for term in self.terms)
        apart = max(forward, self.host[0]) + max(self.device - forward, self.host[1])
        return self.waits + apart - max(self.device, sum(self.host))


class StepWork(NamedTuple):
    """FLOPs of one rank in one step.

    model: as MFU counts them. products, attention: as executed, matrix products and attention's core. newton_schulz:
    of the update. matrix_elements: elements of the matrices that it orthogonalizes.
    """

    model: float
    products: float
    attention: float
    newton_schulz: float
    matrix_elements: float = 0.0


class StepSeconds(NamedTuple):
    """Seconds of one step by kind of work (see the module); gathers, tokens and moved are communication.

    memory: activations and weights read and written. state: clipping and the optimizers' passes over the state. moved:
    the update's communication. host: its launches. waits: the device is idle because the host waits for sizes.
    """

    products: float
    attention: float
    memory: float
    gathers: float
    tokens: float
    newton_schulz: float
    state: float
    moved: float
    host: float = 0.0
    waits: float = 0.0

    @property
    def compute(self) -> float:
        """Forward and backward passes on the device without communication."""
        return self.products + self.attention + self.memory

    @property
    def computing(self) -> float:
        """The step without any communication."""
        return max(self.compute, self.host) + self.newton_schulz + self.state

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
        return max(self.compute, self.gathers, self.host) + self.tokens + self.waits + self.update


def step_work(config: RunConfig, muon: Muon, load: RankLoad, replicas: int) -> StepWork:
    """FLOPs of one rank's share of a step; `replicas` replicas of the model may share Newton-Schulz."""
    flops = flops_per_token(config.model, config.data.sequence_length)
    again = recomputed_parts(config)
    times = {part: 3 + (part in again) for part in flops}
    products = sum(times[part] * flops[part] for part in flops if part not in ("attention core", "total", "training"))
    attention = (times["attention core"] + 0.5) * flops["attention core"]
    return StepWork(
        load.tokens * flops["training"],
        load.tokens * products,
        load.tokens * attention,
        *_newton_schulz(muon, replicas),
    )


def _newton_schulz(muon: Muon, replicas: int) -> tuple[float, float]:
    """FLOPs and elements of the matrices that this rank orthogonalizes."""
    flops = elements = 0.0
    for batch in muon.batches:
        matrices, shared = matrices_per_rank(muon, batch, replicas)
        computed = -(-matrices // replicas) if shared else matrices
        flops += computed * newton_schulz_flops(*batch.shape, muon.steps)
        elements += computed * batch.shape[0] * batch.shape[1]
    return flops, elements


def estimate_microbatch(
    config: RunConfig,
    rank: FakeRank,
    load: RankLoad,
    deferred: bool,
    gpu: GPU,
    implementation: Implementation = PRESENT,
) -> Microbatch:
    """Where a microbatch goes; a prediction.

    Args:
        config: at the segment's sequence length.
        deferred: whether gradients are reduced once a step.
    """
    experts = rank.ranks.sizes.expert
    model = model_terms(config, load, experts, deferred, gpu, implementation)
    copies = copy_terms(config, load, rank.groups, deferred, gpu, implementation)
    host = host_seconds(config, load, rank.groups, deferred, gpu, implementation)
    return Microbatch([*model, *copies], host, wait_seconds(config, experts, implementation))


def step_seconds(
    config: RunConfig,
    microbatches: int,
    microbatch: Microbatch,
    work: StepWork,
    flows: list[Flow],
    state: dict[str, int],
    gpu: GPU,
) -> StepSeconds:
    """Seconds of a step by the roofline model.

    Args:
        microbatches: of the step.
        flows: all of the step's collectives.
        state: from state_bytes: bytes of Muon's momentum and of AdamW's moments.
    """
    update_peak = gpu.bf16 if config.optim.muon.dtype == "bfloat16" else gpu.fp32
    matrix_bytes = NEWTON_SCHULZ_BYTES / 2 * getattr(torch, config.optim.muon.dtype).itemsize * work.matrix_elements
    passes = MUON_PASSES * state["Muon momentum"] + ADAMW_PASSES * state["AdamW moments"] / 2
    communication = dict.fromkeys(("passes", "exchange", "update"), 0.0)
    for flow in flows:
        communication[flow.phase] += flow_seconds(flow, gpu, LINKS)
    kinds = dict.fromkeys(("products", "attention", "memory"), 0.0)
    for term in microbatch.terms:
        kinds[term.kind] += microbatches * term.seconds
    return StepSeconds(
        **kinds,
        gathers=communication["passes"],
        tokens=communication["exchange"],
        newton_schulz=max(work.newton_schulz / (SHARES["products"] * update_peak), matrix_bytes / memory_rate(gpu)),
        state=passes / memory_rate(gpu),
        moved=communication["update"],
        host=microbatches * sum(microbatch.host),
        waits=microbatches * microbatch.host_exposed,
    )
