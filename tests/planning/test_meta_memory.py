"""Bytes alive, against sizes written down by hand, on meta and with memory."""

import pytest
import torch
from torch import nn

from trinity.planning.meta_memory import LiveBytes


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_what_comes_and_goes(device: str) -> None:
    """A view is nothing new, an operation in place neither; what was there before is not counted."""
    outside = torch.empty(100, device=device)
    with LiveBytes() as live:
        a = torch.empty(10, device=device)  # 40 bytes
        view = a[2:].view(2, 4)
        outside.mul_(2)[:50].add_(1)
        assert (live.now, live.peak) == (40, 40)
        b = a.double()  # 80
        assert live.now == 120
        del b
        assert (live.now, live.peak) == (40, 120)
        del a
        assert live.now == 40
        del view
    assert (live.now, live.peak) == (0, 120)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_what_autograd_keeps(device: str) -> None:
    """exp keeps its result, which nobody else holds; x was there before."""
    x = nn.Parameter(torch.empty(25, device=device))
    with LiveBytes() as live:
        y = x.exp().sum()
        assert live.now == 100 + 4
        y.backward()
        del y
        assert live.now == 100  # x's gradient
