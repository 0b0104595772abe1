"""A model small enough to compare with loops: every kind of layer, sizes that differ from one another."""

from collections.abc import Iterator

import pytest
import torch

from trinity.config.model import ModelConfig


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums keep their order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny() -> ModelConfig:
    """Five layers, the first dense, the fourth global; heads of width 8, so that h_q·d_h = 32 is not d = 24."""
    return ModelConfig(
        vocab_size=50, width=24, layers=5, dense_layers=1, dense_width=40, heads=4, kv_heads=2, head_dim=8, window=5,
        experts=6, active_experts=2, shared_experts=2, expert_width=10, route_scale=2.5, rope_theta=100.0,
        max_positions=64,
    )  # fmt: skip
