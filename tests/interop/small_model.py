"""A model with every kind of tensor, small enough to export in every test."""

from dataclasses import replace

import torch

from trinity.models import ModelConfig, Trinity

CONFIG = ModelConfig(
    vocab_size=300, width=24, layers=5, dense_layers=2, dense_width=40, heads=4, kv_heads=2, head_dim=8, window=7,
    experts=6, active_experts=2, shared_experts=2, expert_width=16, route_scale=2.5, rope_theta=500.0, norm_eps=1e-4,
    max_positions=64,
)  # fmt: skip


def make_model(**changes: object) -> Trinity:
    """A model whose tensors all differ, gains and biases too; expert_momentum is not 0."""
    model = Trinity(replace(CONFIG, **changes))
    model.init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("gain", "expert_bias", "expert_momentum")):
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.2)
    return model
