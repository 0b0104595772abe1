"""Export and import of a sharded model: the files and weights equal those of one process, bit for bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from tests.parallel.test_mesh_sizes import sizes
from trinity.checkpoint.directory import CheckpointDirectory
from trinity.checkpoint.load import model_state
from trinity.checkpoint.save import save
from trinity.config.load import save_config
from trinity.config.model import ModelConfig
from trinity.config.run import PrecisionConfig, RunConfig, RunSection
from trinity.errors import UserError
from trinity.interop import export_hf, load_hf
from trinity.models import Trinity
from trinity.parallel.fsdp import shard_model
from trinity.parallel.mesh import join_meshes
from trinity.training.load_run import load_sharded_model

# 4 ranks: rows of some matrices do not divide by them, and gains of 6 leave the last rank none
SIZES = {
    "vocab_size": 301, "width": 24, "layers": 5, "dense_layers": 2, "dense_width": 40, "heads": 4, "kv_heads": 2,
    "head_dim": 6, "window": 7, "experts": 8, "active_experts": 2, "expert_width": 16,
}  # fmt: skip

MESHES = {
    "shard 4": (4, {}, {}),
    "shard 4, expert 2": (4, {"expert": 2}, {}),
    "replicate 2 × shard 2, expert 2": (4, {"replicate": 2, "expert": 2}, {}),
    "more shards than experts": (4, {}, {"experts": 6}),
    "more shards than experts, expert 2": (4, {"expert": 2}, {"experts": 2}),
    "shard 2": (2, {}, {}),
}


def make_filled_model(config: ModelConfig) -> Trinity:
    """A whole model with no two equal tensors."""
    model = Trinity(config)
    model.init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("gain", "expert_bias")):
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.2)
    return model


def load_and_export(config: ModelConfig, words: dict, source: Path, target: Path) -> dict[str, Tensor]:
    """Load a folder into a sharded model and export it again; return the loaded weights, gathered."""
    world = dist.get_world_size()
    ranks = join_meshes(sizes(world, config, **words), torch.device("cpu"))
    with torch.device("meta"):
        model = Trinity(config)
    shard_model(model, ranks, PrecisionConfig(compute="float32"))
    model.to_empty(device="cpu")
    load_hf(source, into=model)
    export_hf(model, target, dtype=torch.float32)
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("mesh", MESHES)
def test_round_trip(processes: Callable, tmp_path: Path, mesh: str) -> None:
    """Folder of one process → shards on every rank → the same folder."""
    world, words, changes = MESHES[mesh]
    config = ModelConfig(**(SIZES | changes))
    model = make_filled_model(config)
    export_hf(model, tmp_path / "one", dtype=torch.float32)
    runs = processes(world).run(load_and_export, config, words, tmp_path / "one", tmp_path / "many")
    for run in runs:
        for name, tensor in model.state_dict().items():
            if not name.endswith("expert_momentum"):  # not in the files; a fresh run's zeros
                assert torch.equal(run[name], tensor), name
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())
    one, many = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "many"))
    assert one.keys() == many.keys()
    assert all(torch.equal(many[name], tensor) for name, tensor in one.items())


def export_error(folder: Path) -> str:
    """The error message on this rank when the folder is not an earlier export."""
    ranks = join_meshes(sizes(dist.get_world_size()), torch.device("cpu"))
    with torch.device("meta"):
        model = Trinity(ModelConfig(**SIZES))
    shard_model(model, ranks, PrecisionConfig(compute="float32"))
    try:
        export_hf(model, folder)
    except UserError as error:
        return str(error)
    return ""


def test_a_user_error_reaches_every_rank(processes: Callable, tmp_path: Path) -> None:
    """Only rank 0 checks the folder; without its error the others would hang in a gather."""
    (tmp_path / "mine.txt").write_text("not an export")
    message = f"{tmp_path} exists and is not an earlier export; give the name of a folder to make"
    assert processes(2).run(export_error, tmp_path) == [message, message]


def export_of_a_run(run: Path, target: Path) -> int:
    """As tools/export_hf.py under torchrun."""
    model, _, step = load_sharded_model(run)
    export_hf(model, target, dtype=torch.float32)
    return step


def test_export_of_a_checkpoint_by_four_processes(processes: Callable, tmp_path: Path) -> None:
    """Each of four processes reads a quarter of the checkpoint; the files equal those of the whole model."""
    config = ModelConfig(**SIZES)
    model = make_filled_model(config)
    save_config(RunConfig(run=RunSection(steps=5), model=config), tmp_path / "config.yaml")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    save(model_state(model), CheckpointDirectory.at(tmp_path), 5, keep=1)
    dist.destroy_process_group()
    export_hf(model, tmp_path / "one", dtype=torch.float32)
    assert processes(4).run(export_of_a_run, tmp_path, tmp_path / "many") == [5] * 4
    one, many = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "many"))
    assert one.keys() == many.keys()
    assert all(torch.equal(many[name], tensor) for name, tensor in one.items())
