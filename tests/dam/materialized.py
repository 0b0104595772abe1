"""The merge written out: every tensor Σ_i W_i·diag(c_i) by its name on disk, as the parameters of a plain model."""

from pathlib import Path

import torch
from torch import Tensor

from tests.merging.conftest import tensors_of
from trinity.config.model import ModelConfig
from trinity.interop.weight_map import weight_map
from trinity.models import Trinity


def random_coefficients(models: int, shapes: dict[str, torch.Size], by_column: bool) -> dict[str, Tensor]:
    """Leaves [N, I] or [N, 1] in float64 for every tensor but the expert biases, around 1/N."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for name, shape in sorted(shapes.items()):
        if not name.endswith("expert_bias"):
            width = shape[-1] if by_column else 1
            noise = torch.randn(models, width, generator=generator, dtype=torch.float64)
            found[name] = (1 / models + 0.2 * noise).requires_grad_()
    return found


def materialized(folders: list[Path], coefficients: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Parameters and buffers of the merged model in float64, differentiable in the coefficients."""
    sources = [tensors_of(folder) for folder in folders]
    with torch.device("meta"):
        empty = Trinity(config)
    state = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in empty.state_dict().items()}
    for name, parameter, index in weight_map(config):
        tensors = [source[name].double() for source in sources]
        if name in coefficients:
            merged = sum(tensor * c for tensor, c in zip(tensors, coefficients[name]))
        else:
            merged = sum(tensors) / len(tensors)
        whole = state[parameter].clone()
        whole[index] = merged
        state[parameter] = whole
    return state
