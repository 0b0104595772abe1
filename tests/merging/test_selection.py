"""Exact cuts and quantiles, by numpy in one block and by histograms in many, with sorted lists in Python."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from trinity.merging import selection
from trinity.merging.selection import largest, quantiles, smallest_at

KINDS = {
    "distinct": lambda g: torch.rand(997, generator=g),
    "bf16": lambda g: torch.rand(997, generator=g).bfloat16().float(),
    "few": lambda g: torch.randint(4, (997,), generator=g).float(),
    "zeros": lambda g: torch.zeros(997),
    "tiny": lambda g: torch.rand(997, generator=g) * 1e-42,
    "wide": lambda g: 10 ** (torch.rand(997, generator=g) * 70 - 35),
}


@pytest.fixture(params=[1 << 20, 64], ids=["partition", "histograms"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Size of a block; more than one block makes `smallest_at` count."""
    monkeypatch.setattr(selection, "BLOCK", request.param)
    return request.param


def blocks(values: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    return ((start, values[start : start + size]) for start in range(0, len(values), size))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, 1, 2, 500, 996, 997, 2000])
def test_the_k_largest(kind: str, k: int, block: int) -> None:
    """Exactly k, the largest, and of equal ones the first."""
    values = KINDS[kind](torch.Generator().manual_seed(1))
    cut = largest(lambda: blocks(values, block), k, len(values))
    mask = torch.cat([cut.above(part, first) for first, part in blocks(values, block)])
    order = sorted(range(len(values)), key=lambda i: (-values[i].item(), i))
    assert sorted(order[:k]) == mask.nonzero().view(-1).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_order_statistics(kind: str, block: int) -> None:
    values = KINDS[kind](torch.Generator().manual_seed(2))
    ranks = [0, 1, 498, 995, 996, 498]
    found = smallest_at(lambda: blocks(values, block), ranks, len(values))
    assert found == [values.sort().values[rank].item() for rank in ranks]


def test_quantiles(block: int) -> None:
    values = KINDS["distinct"](torch.Generator().manual_seed(3))
    shares = [0.0, 0.25, 0.5, 0.75, 0.999, 1.0]
    found = quantiles(lambda: blocks(values, block), shares, len(values))
    assert found == pytest.approx(np.quantile(values.double().numpy(), shares).tolist(), rel=1e-12)
