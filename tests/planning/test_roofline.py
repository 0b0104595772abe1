"""FLOPs and seconds of a step, calculated by hand."""

from dataclasses import replace

import pytest

from trinity.config.model import ModelConfig
from trinity.config.run import DataConfig, MuonConfig, OptimConfig, ParallelConfig, PrecisionConfig, RunConfig
from trinity.hardware import GPU
from trinity.models import Trinity, parameter_roles
from trinity.models.flops import flops_per_token
from trinity.optim.newton_schulz import newton_schulz_flops
from trinity.parallel.mesh import check_parallel
from trinity.planning.communication import Flow
from trinity.planning.fake_rank import fake_rank
from trinity.planning.roofline import ACHIEVED, PASSES, UPDATE_PASSES, StepSeconds, StepWork, step_seconds, step_work
from trinity.planning.schedule_segments import RankLoad

CARD = GPU(bf16=1e12, fp32=1e11, memory=1.0, bandwidth=1e10, node_link=1e9, network=1e8)
LOAD = RankLoad(rows=6, microbatch=2, microbatches=3, tokens=60)


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


@pytest.mark.parametrize(("compute", "peak"), [("bfloat16", 1e12), ("float32", 1e11)])
@pytest.mark.parametrize(("recompute", "passes"), [("none", PASSES), ("block", PASSES + 2)])
def test_seconds(tiny: ModelConfig, compute: str, peak: float, recompute: str, passes: int) -> None:
    """Work divided by rates; a flow counts in its phase: 4 ranks of a node send 3/4 of 1e9 bytes over NVLink."""
    config = RunConfig(model=tiny, precision=PrecisionConfig(compute=compute), recompute=recompute)
    phases = ["passes", "passes", "exchange", "update"]
    flows = [Flow(phase, str(i), "all_gather", "shard", 4, 1, 1, 1e9) for i, phase in enumerate(phases)]
    took = step_seconds(config, StepWork(7e12, 3e12, 2e12, 1e12), flows, produced=1e9, state=2e9, gpu=CARD)
    travel = 0.75 / ACHIEVED["links"]
    assert took == pytest.approx(
        StepSeconds(
            products=3e12 / peak / ACHIEVED["products"],
            attention=2e12 / peak / ACHIEVED["attention"],
            memory=passes * 0.1 / ACHIEVED["memory"],
            gathers=2 * travel,
            tokens=travel,
            newton_schulz=1 / ACHIEVED["products"],
            state=UPDATE_PASSES * 0.2 / ACHIEVED["memory"],
            moved=travel,
        ),
        rel=1e-12,
    )


@pytest.mark.parametrize(
    ("seconds", "step"),
    [
        # compute 1 + 2 + 4 hides gathers of 6 and not of 9; the update's 1 + 2 hides 3 and not 5
        (StepSeconds(1, 2, 4, 6, 10, 1, 2, 3), 7 + 10 + 3),
        (StepSeconds(1, 2, 4, 9, 10, 1, 2, 5), 9 + 10 + 5),
    ],
)
def test_overlap(seconds: StepSeconds, step: float) -> None:
    """The step's seconds by the formula of the module's docstring."""
    assert seconds.step == step
    assert seconds.computing == 10
    assert seconds.traffic == seconds.gathers + 10 + seconds.moved
