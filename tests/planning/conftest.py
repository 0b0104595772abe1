"""A model small enough to count by hand, with distinct sizes."""

import pytest

from trinity.config.model import ModelConfig


@pytest.fixture
def tiny() -> ModelConfig:
    """d 24, four layers (the last global), one of them dense, six experts of 10, two a token."""
    return ModelConfig(
        vocab_size=50, width=24, layers=4, dense_layers=1, dense_width=40, heads=4, kv_heads=2, head_dim=8, window=5,
        experts=6, active_experts=2, expert_width=10,
    )  # fmt: skip
