"""Rank 0's bytes against closed forms: FSDP's row chunks, rounded up, and an even share of the experts."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from trinity.config import load_config
from trinity.config.model import ModelConfig
from trinity.config.run import OptimConfig, ParallelConfig, PrecisionConfig, RunConfig
from trinity.hardware import GPUS
from trinity.models import Trinity, parameter_roles
from trinity.parallel.comm_counter import Traffic
from trinity.parallel.mesh import check_parallel
from trinity.planning.communication import Flow, communication_flows, flow_seconds
from trinity.planning.fake_rank import fake_rank, fsdp_groups, state_bytes
from trinity.planning.schedule_segments import rank_load, schedule_segments

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("parallel", "gpus"),
    [
        (ParallelConfig(shard=1), 1),
        (ParallelConfig(shard=4, expert=2, replicate=3), 12),  # three experts in a share, over two ranks: by width
        (ParallelConfig(shard=3), 3),
        (ParallelConfig(shard=6, expert=2), 6),
        (ParallelConfig(shard=16, expert=2), 16),
    ],
)
@pytest.mark.parametrize("compute", ["bfloat16", "float64"])
def test_state_by_hand(tiny: ModelConfig, parallel: ParallelConfig, gpus: int, compute: str) -> None:
    """Parameters, gradients and momentum in the master dtype; AdamW: two moments, and a step count in fp32.

    Starved steps: one fp32 number for each expert matrix that the rank holds wholly or in part.
    """
    if gpus == 16:
        tiny = ModelConfig(**(vars(tiny) | {"expert_width": 16}))
    config = RunConfig(
        model=tiny, parallel=parallel, precision=PrecisionConfig(compute=compute), optim=OptimConfig(router="adamw")
    )
    sizes = check_parallel(parallel, tiny, gpus)
    size = 8 if compute == "float64" else 4
    expected = dict.fromkeys(("parameters", "gradients", "Muon momentum", "AdamW moments"), 0)
    for role in parameter_roles(Trinity(tiny)):
        rows, *rest = role.parameter.shape
        elements = math.ceil(rows / sizes.shard) * math.prod(rest)
        if role.kind == "experts":
            elements = role.parameter.numel() // sizes.shard
            here = rows // sizes.expert // (sizes.expert_shard if sizes.experts_by == "experts" else 1)
            expected["Muon momentum"] += 4 * here * (2 if len(rest) == 3 else 1)
        for name in ("parameters", "gradients"):
            expected[name] += size * elements
        if role.kind in ("matrix", "experts"):
            expected["Muon momentum"] += size * elements
        else:
            expected["AdamW moments"] += 2 * size * elements + 4
    with fake_rank(config, sizes) as rank:
        assert state_bytes(rank.model, rank.optimizers) == expected | {"expert biases": 3 * 2 * 6 * size}
        assert rank.ranks.device == torch.device("meta")
    assert not dist.is_initialized()


def test_groups_by_hand(tiny: ModelConfig) -> None:
    """Three padded groups a sparse block: norms and router in fp32, the others gathered in bf16, reduced in fp32."""
    config = RunConfig(model=tiny, parallel=ParallelConfig(shard=4, expert=2))
    with fake_rank(config, check_parallel(config.parallel, tiny, 4)) as rank:
        groups = fsdp_groups(rank.model)
    assert [(group.part, group.kind) for group in groups] == [
        ("embed", "dense"),
        ("blocks.0", "dense"), ("blocks.0", "precise"),
        *[(f"blocks.{i}", kind) for i in (1, 2, 3) for kind in ("dense", "precise", "experts")],
        ("norm", "precise"),
        ("head", "dense"),
    ]  # fmt: skip
    by_name = {(group.part, group.kind): group[2:6] for group in groups}
    assert not any(group.local for group in groups)
    assert by_name["embed", "dense"] == (4, 2 * 52 * 24, 4 * 52 * 24, 2)  # 50 rows are 13 on each
    shared, attention = 20 * 24 + 24 * 10, 96 * 24 + 24 * 32
    assert by_name["blocks.1", "dense"] == (4, 2 * (attention + shared), 4 * (attention + shared), 2)
    precise = 4 * 24 + 2 * 8 + 8 * 24  # gains, and the router's 6 rows as 8
    assert by_name["blocks.1", "precise"] == (4, 4 * precise, 4 * precise, 2)
    experts = 3 * 3 * 10 * 24
    assert by_name["blocks.1", "experts"] == (2, 2 * experts, 4 * experts, 2)


def test_refused_inside_a_process_group(tiny: ModelConfig) -> None:
    """The process's own group stays."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        config = RunConfig(model=tiny)
        with (
            pytest.raises(AssertionError, match="not joined"),
            fake_rank(config, check_parallel(config.parallel, tiny, 1)),
        ):
            pass
        assert dist.get_backend() == "gloo"
    finally:
        dist.destroy_process_group()


def test_large_on_2048() -> None:
    """Each rank holds a 128th of 398.6 billion parameters; experts move 391 GB a microbatch, 3.7 s at 100 GB/s."""
    config = load_config(CONFIGS / "large.yaml", ["batch.microbatch=1"])
    with fake_rank(config, check_parallel(config.parallel, config.model, 2048)) as rank:
        state = state_bytes(rank.model, rank.optimizers)
        load = rank_load(config, schedule_segments(config)[0], 2048)
        flows = communication_flows(config, rank, load, [Traffic(0, 0)], defer=False)
    assert state["parameters"] / 4 == pytest.approx(398_635_272_192 / 128, rel=1e-4)  # more by some padding
    assert state["parameters"] / 4 >= 398_635_272_192 / 128
    experts: list[Flow] = [flow for flow in flows if flow.purpose in ("weights, experts", "gradients, experts")]
    assert load.microbatch * config.data.sequence_length == 8192
    # gathered twice in two bytes, reduced in four: a rank's share of 391 billion weights
    assert sum(flow.bytes for flow in experts) / load.microbatches == (2 + 2 + 4) * 391_378_894_848 / 8
    took = sum(flow_seconds(flow, GPUS["b300"], achieved=1.0) for flow in experts) / load.microbatches
    assert took == pytest.approx(3.7, abs=0.05)
