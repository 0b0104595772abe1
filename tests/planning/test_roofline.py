"""FLOPs and seconds of a step, calculated by hand."""

from dataclasses import replace

import pytest

from trinity.config.model import ModelConfig
from trinity.config.run import DataConfig, MuonConfig, OptimConfig, ParallelConfig, RunConfig
from trinity.hardware import GPU
from trinity.models import Trinity, parameter_roles
from trinity.models.flops import flops_per_token
from trinity.optim.newton_schulz import newton_schulz_flops
from trinity.parallel.mesh import check_parallel
from trinity.planning.communication import Flow
from trinity.planning.fake_rank import fake_rank
from trinity.planning.roofline import (
    ADAMW_PASSES,
    LINKS,
    MUON_PASSES,
    NEWTON_SCHULZ_BYTES,
    Microbatch,
    StepSeconds,
    StepWork,
    step_seconds,
    step_work,
)
from trinity.planning.schedule_segments import RankLoad
from trinity.planning.step_terms import SHARES, Term

CARD = GPU(bf16=1e12, fp32=1e11, memory=1.0, bandwidth=1e10, node_link=1e9, network=1e8)
LOAD = RankLoad(rows=6, microbatch=2, microbatches=3, tokens=60)
MEMORY = [Term("d", "memory", 128, 0)]


def work(config: RunConfig, gpus: int = 1) -> StepWork:
    with fake_rank(config, check_parallel(config.parallel, config.model, gpus)) as rank:
        return step_work(config, rank.optimizers.muon, LOAD, rank.ranks.sizes.replicate)


@pytest.mark.parametrize(
    ("recompute", "again"),
    [
        ("none", []),
        ("block", ["attention projections", "dense FFN", "router", "routed experts", "shared experts"]),
        ("selective", ["attention projections", "dense FFN", "router", "shared experts"]),
    ],
)
def test_products(tiny: ModelConfig, recompute: str, again: list[str]) -> None:
    """Forward and backward are 3 times forward, recompute adds one; attention's core is 3.5 times, 4.5 in `block`."""
    step = work(RunConfig(model=tiny, data=DataConfig(sequence_length=10), recompute=recompute))
    flops = flops_per_token(tiny, 10)
    products = 3 * (flops["total"] - flops["attention core"]) + sum(flops[part] for part in again)
    assert step.model == 60 * flops["training"]
    assert step.products == pytest.approx(60 * products, rel=1e-12)
    assert step.attention == 60 * (4.5 if recompute == "block" else 3.5) * flops["attention core"]


def test_newton_schulz(tiny: ModelConfig) -> None:
    """One replica: every matrix of the model. Two replicas that share: half each, four of seven matrices."""
    config = RunConfig(model=tiny)
    total, halves = 0, 0
    counts: dict[tuple[int, int], int] = {}
    for role in parameter_roles(Trinity(tiny)):
        for rows in role.rows:
            shape = rows, role.parameter.shape[-1]
            counts[shape] = counts.get(shape, 0) + role.parameter.shape[:-2].numel()
    for (rows, columns), matrices in counts.items():
        total += matrices * newton_schulz_flops(rows, columns, 5)
        halves += -(-matrices // 2) * newton_schulz_flops(rows, columns, 5)
    assert work(config).newton_schulz == total
    copies = replace(config, parallel=ParallelConfig(replicate=2, shard=1))
    assert work(replace(copies, optim=OptimConfig(muon=MuonConfig(share="off"))), 2).newton_schulz == total
    assert work(replace(copies, optim=OptimConfig(muon=MuonConfig(share="on"))), 2).newton_schulz == halves < total


def test_elements_of_matrices(tiny: ModelConfig) -> None:
    """Newton-Schulz reads every element of every matrix."""
    matrices = sum(role.parameter.numel() for role in parameter_roles(Trinity(tiny)) if role.rows)
    assert work(RunConfig(model=tiny)).matrix_elements == matrices


@pytest.mark.parametrize(("dtype", "peak"), [("bfloat16", 1e12), ("float32", 1e11)])
@pytest.mark.parametrize("bound_by", ["FLOPs", "bytes"])
def test_seconds(tiny: ModelConfig, dtype: str, peak: float, bound_by: str) -> None:
    """Terms are summed by kind over three microbatches; work is divided by rates; a flow counts in its phase: 4 ranks
    of a node send 3/4 of 1e9 bytes over NVLink."""
    config = RunConfig(model=tiny, optim=OptimConfig(muon=MuonConfig(dtype=dtype)))
    phases = ["passes", "passes", "exchange", "update"]
    flows = [Flow(phase, str(i), "all_gather", "shard", 4, 1, 1, 1e9) for i, phase in enumerate(phases)]
    terms = [Term("a", "products", 1, 2, 4), Term("b", "products", 8, 16), Term("c", "attention", 32, 64), *MEMORY]
    elements = 1e9 if bound_by == "bytes" else 1.0
    state = {"Muon momentum": 3_000_000_000, "AdamW moments": 2_000_000_000}
    took = step_seconds(
        config, 3, Microbatch(terms, (5, 6), 0.0), StepWork(7e12, 3e12, 2e12, 1e12, elements), flows, state, CARD
    )
    travel, memory = 0.75 / LINKS, 1e10 * SHARES["memory"]
    size = {"bfloat16": 2, "float32": 4}[dtype]
    bound = {"FLOPs": 1e12 / (peak * SHARES["products"]), "bytes": NEWTON_SCHULZ_BYTES * size / 2 * 1e9 / memory}
    assert took == pytest.approx(
        StepSeconds(
            products=3 * 31,
            attention=3 * 96,
            memory=3 * 128,
            gathers=2 * travel,
            tokens=travel,
            newton_schulz=bound[bound_by] if bound_by == "FLOPs" else max(bound.values()),
            state=(MUON_PASSES * 3e9 + ADAMW_PASSES * 1e9) / memory,
            moved=travel,
            host=3 * 11,
            waits=0,
        ),
        rel=1e-12,
    )


@pytest.mark.parametrize(
    ("seconds", "step"),
    [
        # compute 1 + 2 + 4 hides gathers of 6 and not of 9; the update's 1 + 2 hides 3 and not 5
        (StepSeconds(1, 2, 4, 6, 10, 1, 2, 3), 7 + 10 + 3),
        (StepSeconds(1, 2, 4, 9, 10, 1, 2, 5), 9 + 10 + 5),
        # it hides a host of 7 and not of 8; waits add up
        (StepSeconds(1, 2, 4, 6, 10, 1, 2, 3, host=7, waits=2), 7 + 10 + 2 + 3),
        (StepSeconds(1, 2, 4, 6, 10, 1, 2, 3, host=8), 8 + 10 + 3),
    ],
)
def test_overlap(seconds: StepSeconds, step: float) -> None:
    """The step's seconds by the formula of the module's docstring."""
    assert seconds.step == step
    assert seconds.computing == max(7, seconds.host) + 3
    assert seconds.traffic == seconds.gathers + 10 + seconds.moved


@pytest.mark.parametrize(
    ("host", "waits", "exposed"),
    [
        ((9.0, 1.0), 0.0, 0.0),  # without waits the host's lead carries over from forward to backward
        ((1.0, 2.0), 0.5, 0.5),  # a host that keeps up in both passes costs the waits alone
        ((5.0, 1.0), 0.5, 0.5 + 2),  # forward takes the host's 5 in place of 3, backward the device's 12
        ((5.0, 20.0), 0.5, 0.5),  # the host is the longer one in both: nothing but the waits on top of it
    ],
)
def test_waits(host: tuple[float, float], waits: float, exposed: float) -> None:
    """A device of 3 s in forward and 12 s in backward and recompute."""
    microbatch = Microbatch([Term("a", "products", 1, 6, 4), Term("b", "memory", 2, 2)], host, waits)
    assert microbatch.host_exposed == exposed
