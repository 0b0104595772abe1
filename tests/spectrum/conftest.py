"""A folder with every kind of tensor, and one of another architecture."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.interop.small_model import make_model
from trinity.interop import export_hf
from trinity.io.json_files import write_json


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Trinity model of five layers, two of them dense, in fp32; read only."""
    path = tmp_path_factory.mktemp("spectrum") / "model"
    export_hf(make_model(), path, dtype=torch.float32)
    return path


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of another architecture: four layers with a matrix and a gain each, a bias, and two experts."""
    path = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(20, 8), "lm_head.weight": torch.randn(20, 8)}
    for layer in range(4):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.self_attn.q_proj.weight"] = torch.randn(12, 8) * (layer + 1)
        tensors[f"{prefix}.self_attn.q_proj.bias"] = torch.randn(12)
        tensors[f"{prefix}.input_layernorm.weight"] = torch.randn(8)
        tensors |= {f"{prefix}.moe.experts.{e}.w1.weight": torch.randn(6, 8) for e in range(2)}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    write_json(path / "config.json", {"model_type": "llama"})
    return path
