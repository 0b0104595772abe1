"""What a microbatch costs beside the model's arithmetic: the copies that FSDP2 makes, and the host's time.

Copies, in bytes per parameter on n shards, with c bytes in the compute dtype, m of the master and r of the reduced
gradient; read in the source of torch 2.11 and 2.13, and counted in 2.13 for n = 1 (the tests); timed on no GPU:

    weights     cast m + c, copy 2c; n > 1: these on 1/n, and 2c to lay out what was gathered.          n = 1: 10
    gradients   collect c + r, divide 2r, copy 2r/n, add to the shard 3m/n.                              n = 1: 34
    deferred    each microbatch c + 2r, the first c + r, none for experts whose kernels add in place; once a step
                collect 2r, divide, copy; groups on one rank: not the latter, and no weights where c = m

The host launches what the device computes, so a microbatch takes the longer of both. Its time is a count of operations
times HOST. HOST was measured on a CPU core without a GPU, as the least of repeated runs; processors differ by half.
"""

from typing import NamedTuple

import torch

from trinity.config.run import RunConfig
from trinity.hardware import GPU
from trinity.planning.fake_rank import FsdpGroup
from trinity.planning.schedule_segments import RankLoad
from trinity.planning.step_terms import PRESENT, Implementation, Term, memory_rate

HOST = {"launch": 20.0, "torch op": 7.0, "checkpoint": 870.0, "wait": 100.0}
HOST_PASSES = {"product": (7.0, 15.0), "group": (290.0, 315.0), "kept group": (255.0, 205.0)}
"""Microseconds of the host; HOST_PASSES in forward and backward. Not from the report.

launch: of a Triton kernel, before the driver (Triton 3.6). product: a linear layer in torch. torch op: another one.
group: the hooks and copies of one FSDP2 group in a microbatch; kept group: gradients deferred, weights kept.
checkpoint: the contexts of one block's activation checkpointing: 2600 on the reference path, which dispatches about
three times as many operations. wait: from the end of a wait for the device to the next kernel on it (assumed)."""


class BlockOps(NamedTuple):
    """Operations of one block: with autograd, and Triton launches and torch's products in forward and backward."""

    ops: int
    launches: tuple[int, int]
    products: int


DENSE = BlockOps(ops=8, launches=(7, 12), products=4)
"""attention_norm, q_norm, k_norm, attention, sigmoid_gate, add_norm, swiglu and norm_add; the norms launch two kernels
in backward. Products: q-k-v-gate, out, gate-up, down."""
SPARSE = BlockOps(ops=11, launches=(18, 21), products=5)
"""DENSE with route, gates and expert_mlp: grouping takes 4 launches, tile tables 2 and 3, products 2 and 4, sums 1
and 1. One more product: the router's."""

STATISTICS = 15
"""torch operations of the sequence loss and the router's entropy, if they are not in the routing kernel."""


def copy_terms(
    config: RunConfig,
    load: RankLoad,
    groups: list[FsdpGroup],
    deferred: bool,
    gpu: GPU,
    implementation: Implementation = PRESENT,
) -> list[Term]:
    """FSDP2's copies in one microbatch; those of a step divided by its microbatches. A prediction.

    Args:
        deferred: whether gradients are reduced once a step.
    """
    compute = getattr(torch, config.precision.compute).itemsize
    master = max(4, compute)
    weights = gradients = 0.0
    for group in groups:
        c = master if group.kind == "precise" else compute
        r = (
            master
            if group.kind == "precise" or group.local
            else max(compute, getattr(torch, config.precision.reduce).itemsize)
        )
        numel = group.reduced / r
        weights += (
            (numel + group.frozen)
            * _weight_bytes(group, c, master, implementation)
            / _unshards_a_step(group, load, deferred, implementation)
        )
        gradients += numel * _gradient_bytes(group, load, deferred, implementation, (c, master, r))
    rate = memory_rate(gpu)
    terms = [
        Term("FSDP2 copies weights", "memory", weights / rate, 0.0),
        Term("FSDP2 copies gradients", "memory", 0.0, gradients / rate),
    ]
    return [term for term in terms if term.seconds > 0]


def _weight_bytes(group: FsdpGroup, c: float, m: float, implementation: Implementation) -> float:
    """Of all gathers of a microbatch, per parameter."""
    if not group.gathered and implementation.hands_over:
        return 0.0
    once = ((m + c if c != m else 0.0) + 2 * c) / group.shards + (2 * c if group.shards > 1 else 0.0)
    return group.gathers * once


def _unshards_a_step(group: FsdpGroup, load: RankLoad, deferred: bool, implementation: Implementation) -> int:
    """Microbatches that share one copy of the weights."""
    return load.microbatches if deferred and implementation.keeps_weights and group.shards == 1 else 1


def _gradient_bytes(
    group: FsdpGroup,
    load: RankLoad,
    deferred: bool,
    implementation: Implementation,
    sizes: tuple[float, float, float],
) -> float:
    """Of a microbatch, per parameter; sizes are c, m and r."""
    (c, m, r), n, microbatches = sizes, group.shards, load.microbatches
    divided = 2 * r if implementation.divides_gradients and n == 1 else 0.0
    if not deferred:
        return c + r + divided + 2 * r / n + 3 * m / n * (microbatches - 1) / microbatches
    in_place = group.kind == "experts" and implementation.adds_in_place
    if group.local and implementation.hands_over:
        cast = c + r if c != m else 0.0
        return 0.0 if in_place else (cast + (microbatches - 1) * (c + 2 * r)) / microbatches
    added = 0.0 if in_place else c + 2 * r - r / microbatches
    return added + (2 * r + divided + 2 * r / n) / microbatches


def host_seconds(
    config: RunConfig,
    load: RankLoad,
    groups: list[FsdpGroup],
    deferred: bool,
    gpu: GPU,
    implementation: Implementation = PRESENT,
) -> tuple[float, float]:
    """The host's time of one microbatch, in forward and backward; 0 for a plan on a CPU, which computes itself.

    torch.compile of blocks leaves the launches (assumed).
    """
    if gpu.name == "cpu":
        return 0.0, 0.0
    model, eager = config.model, config.compile == "none"
    forward = backward = 0.0
    for layers, block in ((model.dense_layers, DENSE), (model.moe_layers, SPARSE)):
        there = HOST["launch"] * block.launches[0]
        back = HOST["launch"] * block.launches[1]
        if eager:
            there += implementation.op_us / 2 * block.ops + HOST_PASSES["product"][0] * block.products
            back += implementation.op_us / 2 * block.ops + HOST_PASSES["product"][1] * block.products
            if implementation.separate_statistics and block is SPARSE:
                there += HOST["torch op"] * STATISTICS
        if config.recompute != "none":
            back += there + HOST["checkpoint"]
        forward, backward = forward + layers * there, backward + layers * back
    for group in groups:
        kept = deferred and implementation.keeps_weights and group.shards == 1
        there, back = HOST_PASSES["kept group" if kept else "group"]
        forward, backward = forward + there, backward + back
    return 1e-6 * forward, 1e-6 * backward


def wait_seconds(config: RunConfig, expert_ranks: int, implementation: Implementation = PRESENT) -> float:
    """Time of one microbatch in which the device is idle after the host's waits for the sizes of an exchange."""
    waits = config.model.moe_layers if expert_ranks > 1 and implementation.waits_for_sizes else 0
    return 1e-6 * HOST["wait"] * waits
