"""Parameters, FLOPs, steps and bytes against counting by hand, by loops, and by torch's own FLOP counter."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trinity.config.model import ZOO, ModelConfig
from trinity.config.run import Batch, Data, Parallel, RampEntry, Run, RunConfig
from trinity.models import Trinity
from trinity.models.accounting import (
    Stretch,
    describe,
    flops_per_token,
    parameter_counts,
    static_memory,
    stretches,
)

PUBLISHED = {"nano": 6_120_003_328, "mini": 26_123_974_400, "large": 398_635_286_016}
REPORTED_ACTIVE = {"nano": "1B", "mini": "3B", "large": "13B"}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_counts_of_the_report(name: str) -> None:
    """The exact totals, and the active parameters in whole billions, cut as the report's table cuts them."""
    counts = parameter_counts(ZOO[name])
    assert counts["total"] == PUBLISHED[name]
    assert f"{counts['active'] // 10**9}B" == REPORTED_ACTIVE[name]
    assert sum(count for part, count in counts.items() if part not in ("total", "active")) == counts["total"]


def test_counts_by_hand(tiny: ModelConfig) -> None:
    """Every part from the sizes in the conftest: d 24, four heads of 8 and two key/value heads, six experts of 10."""
    assert parameter_counts(tiny) == {
        "embedding": 50 * 24,
        "head": 50 * 24,
        "attention": 5 * (24 * (32 + 16 + 16 + 32) + 32 * 24),
        "dense FFN": 3 * 24 * 40,
        "router": 4 * 6 * 24,
        "routed experts": 4 * 6 * 3 * 24 * 10,
        "shared experts": 4 * 3 * 24 * 20,
        "norms": 5 * (4 * 24 + 2 * 8) + 24,
        "expert bias": 4 * 6,
        "total": 44_864,
        "active": 44_864 - 4 * (6 - 2) * 3 * 24 * 10,
    }


@pytest.mark.parametrize("sequence", [1, 4, 5, 6, 24])
def test_visible_tokens(tiny: ModelConfig, sequence: int) -> None:
    """The attention core against a loop over layers and tokens: 4·h_q·d_h each time a token sees one."""
    seen = 0
    for layer in range(5):
        for t in range(sequence):
            seen += len(range(0 if layer == 3 else max(0, t - 5 + 1), t + 1))
    assert flops_per_token(tiny, sequence)["attention core"] == pytest.approx(4 * 32 * seen / sequence, rel=1e-14)


def test_matrix_products_against_torchs_counter(tiny: ModelConfig) -> None:
    """torch counts plain products; it does not look into our expert op, and attention's core is not a plain product."""
    model = Trinity(tiny, attention="sdpa")
    model.init_weights(seed=0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 24, dtype=torch.int64))
    flops = flops_per_token(tiny, 24)
    plain = flops["total"] - flops["routed experts"] - flops["attention core"]
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == pytest.approx(2 * 24 * plain, rel=1e-14)


def test_routed_experts_by_hand(tiny: ModelConfig) -> None:
    """Two of six experts a token, three matrices of 24 × 10 each, four layers."""
    assert flops_per_token(tiny, 24)["routed experts"] == 4 * 2 * 3 * 2 * 24 * 10


@pytest.mark.parametrize(
    ("name", "sequence", "gflop"), [("nano", 4096, "6.25"), ("mini", 4096, "21.4"), ("large", 8192, "93.7")]
)
def test_totals_at_training_length(name: str, sequence: int, gflop: str) -> None:
    """The three digits are an independent count that gives flash attention's backward 5 products to forward's 2.

    So half a forward of the core comes on top of three times forward.
    """
    flops = flops_per_token(ZOO[name], sequence)
    assert f"{(flops['training'] + flops['attention core'] / 2) / 1e9:.3g}" == gflop
    assert flops["training"] == 3 * flops["total"]


def run(steps: int | None, tokens: int | None, ramp: list[tuple[int, int]]) -> RunConfig:
    entries = [RampEntry(tokens=at, sequences=sequences) for at, sequences in ramp]
    batch = Batch(sequences=3, ramp=entries)
    return RunConfig(run=Run(steps=steps, tokens=tokens), data=Data(sequence_length=10), batch=batch)


@pytest.mark.parametrize(("steps", "tokens"), [(0, None), (1, None), (40, None), (None, 1), (None, 90), (None, 2000)])
@pytest.mark.parametrize("ramp", [[], [(1, 5)], [(90, 4), (100, 7)], [(61, 4), (62, 5), (500, 100)], [(10**6, 5)]])
def test_stretches(steps: int | None, tokens: int | None, ramp: list[tuple[int, int]]) -> None:
    """Against walking the run step by step."""
    config = run(steps, tokens, ramp)
    expected: list[Stretch] = []
    step = seen = 0
    while step < steps if tokens is None else seen < tokens:
        sequences = [3, *(size for at, size in ramp if at <= seen)][-1]
        if expected and expected[-1].sequences == sequences:
            expected[-1] = expected[-1]._replace(steps=expected[-1].steps + 1)
        else:
            expected.append(Stretch(step, seen, sequences, 1))
        step, seen = step + 1, seen + 10 * sequences
    assert stretches(config) == expected


def test_memory_of_nano_on_one_rank() -> None:
    """Exact bytes: 4 for a parameter and its gradient, 4 for Muon's, 8 for AdamW's; 410 million are AdamW's."""
    adamw = 2 * 200_192 * 1024 + 244_736
    everything = PUBLISHED["nano"] - 6_912  # expert_bias is a buffer
    memory = static_memory(RunConfig(model=ZOO["nano"]), ranks=1)
    assert memory == {
        "parameters": 4 * everything,
        "gradients": 4 * everything,
        "Muon momentum": 4 * (everything - adamw),
        "AdamW moments": 8 * adamw,
        "state": 8 * everything + 4 * (everything - adamw) + 8 * adamw,
        "copy of the largest part": 2 * 200_192 * 1024,  # the embedding: a sparse block has half as many
        "copy of the whole model": 2 * everything,
    }


def test_memory_when_sharded(tiny: ModelConfig) -> None:
    """State divides by the ranks; a gathered block has all of its dense part and a rank's share of its experts."""
    config = RunConfig(model=tiny, parallel=Parallel(shard=4, expert=2))
    alone, sharded = static_memory(replace(config, parallel=Parallel()), 1), static_memory(config, 4)
    assert sharded["state"] == alone["state"] / 4
    dense = 24 * 96 + 32 * 24 + 4 * 24 + 2 * 8 + 6 * 24 + 3 * 24 * 20
    assert alone["copy of the largest part"] == 2 * (dense + 6 * 3 * 24 * 10)
    assert sharded["copy of the largest part"] == 2 * (dense + 3 * 3 * 24 * 10)


def test_memory_follows_precision_and_the_routers_optimizer(tiny: ModelConfig) -> None:
    """float64 doubles all state, copies are then as large as parameters; AdamW's router moves 4 bytes to 8."""
    config = RunConfig(model=tiny)
    memory = static_memory(config, 1)
    config.precision.compute = "float64"
    wide = static_memory(config, 1)
    assert wide["state"] == 2 * memory["state"]
    assert wide["copy of the whole model"] == wide["parameters"] == 4 * memory["copy of the whole model"]
    config.precision.compute, config.optim.router = "bfloat16", "adamw"
    moved = static_memory(config, 1)
    router = 4 * 6 * 24
    assert moved["AdamW moments"] - memory["AdamW moments"] == 8 * router
    assert memory["Muon momentum"] - moved["Muon momentum"] == 4 * router


def test_describe() -> None:
    """Each table's columns are aligned, and the numbers are those of the functions above."""
    config = RunConfig(
        model=ZOO["large"],
        run=Run(tokens=17 * 10**12),
        data=Data(sequence_length=8192),
        batch=Batch(sequences=12_288, ramp=[RampEntry(tokens=49 * 10**11, sequences=16_384)]),
        parallel=Parallel(replicate=-1, shard=128, expert=8),
    )
    text = describe(config)
    parameters, work, length, memory = (
        {line.split("  ")[0].strip(): line.split() for line in table.splitlines()} for table in text.split("\n\n")
    )
    assert parameters["total"][1] == "398,635,286,016"
    assert parameters["active"][1:] == ["13,371,686,400", "3.4%"]
    assert work["training"][1] == f"{flops_per_token(ZOO['large'], 8192)['training'] / 1e9:,.3f}"
    # 48,678 steps of 100,663,296 tokens reach 4.9e12, and 90,152 of 134,217,728 the rest
    assert length["in all"][2:] == ["138,830", f"{48_678 * 100_663_296 + 90_152 * 134_217_728:,}"]
    assert memory["state"][1] == f"{static_memory(config, 128)['state'] / 1e9:.2f}"
    assert "a copy of the model on 128 ranks" in text
    for table in text.split("\n\n")[:3]:
        ends = {len(line) for line in table.splitlines()}
        assert len(ends) == 1


@pytest.mark.parametrize(
    ("parallel", "processes", "ranks"),
    [
        (Parallel(), 1, "1 rank"),
        (Parallel(), 8, "8 ranks"),
        (Parallel(replicate=2), 8, "4 ranks"),
        (Parallel(replicate=-1, shard=4, context=2), 1, "8 ranks"),
    ],
)
def test_describe_knows_the_mesh(tiny: ModelConfig, parallel: Parallel, processes: int, ranks: str) -> None:
    """replicate · shard · context = processes: one copy is on shard · context of them."""
    config = RunConfig(run=Run(steps=1), model=tiny, parallel=parallel)
    assert f"GB per rank, a copy of the model on {ranks} " in describe(config, processes).replace("\n", " ")
