"""Parameters and FLOPs against counting by hand, by loops, and by torch's own FLOP counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trinity.config.model import ZOO, ModelConfig
from trinity.config.run import KernelsConfig
from trinity.models import Trinity
from trinity.models.flops import flops_per_token, parameter_counts

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
    """The attention core against a loop over layers and tokens: 4·h_q·d_h for each token and visible key."""
    visible = 0
    for layer in range(5):
        for t in range(sequence):
            visible += len(range(0 if layer == 3 else max(0, t - 5 + 1), t + 1))
    assert flops_per_token(tiny, sequence)["attention core"] == pytest.approx(4 * 32 * visible / sequence, rel=1e-14)


def test_matrix_products_against_torchs_counter(tiny: ModelConfig) -> None:
    """torch counts matrix products; it does not see into the custom op of the experts or the attention core."""
    model = Trinity(tiny, KernelsConfig(attention="sdpa"))
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
