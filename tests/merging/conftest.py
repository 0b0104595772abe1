"""A small family of models: a base and three children near it, with every kind of tensor, exported in fp32."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.interop.small_model import CONFIG, make_model
from trinity.data.tokenizer.tokenizer import save_tokenizer, train_tokenizer
from trinity.interop import export_hf
from trinity.models import Trinity

TEXT = ["the rain in Spain stays mainly in the plain; plainly the rain in Spain stays"] * 2


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One CPU thread, so that sums keep their order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 280 tokens for models of 300 rows."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(TEXT, 280), folder)
    return folder


def child(seed: int, size: float = 0.05, **changes: object) -> Trinity:
    """The base (seed 0) or a model near it; a third of each difference is 0."""
    model = make_model(**changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values() if seed else ():
            delta = torch.randn(tensor.shape, generator=generator) * size * tensor.std().clamp_min(0.02)
            delta[torch.rand(tensor.shape, generator=generator) < 0.3] = 0
            tensor.add_(delta)
    return model


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """Folders base, a, b and c, in several files each; read only."""
    folder = tmp_path_factory.mktemp("family")
    for seed, name in enumerate(("base", "a", "b", "c")):
        export_hf(child(seed), folder / name, tokenizer, torch.float32, max_shard_bytes=100_000)
    return folder


@pytest.fixture
def family(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `originals` to damage, which is the current folder: recipes name base, a, b, c."""
    shutil.copytree(originals, tmp_path / "family")
    monkeypatch.chdir(tmp_path / "family")
    return tmp_path / "family"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the tensors of a folder and write them into one file."""
    tensors = tensors_of(folder)
    change(tensors)
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def edit_json(path: Path, **values: object) -> None:
    """Set values of a JSON object; None removes a key."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def fuse(tensors: dict, layers: range = range(2, 5)) -> None:
    """Replace the experts' matrices of some layers by stacks, as transformers holds them in memory."""
    for layer in layers:
        prefix = f"model.layers.{layer}.mlp.experts"

        def matrix(expert: int, name: str, prefix: str = prefix) -> torch.Tensor:
            return tensors.pop(f"{prefix}.{expert}.{name}_proj.weight")

        experts = range(CONFIG.experts)
        tensors[f"{prefix}.gate_up_proj"] = torch.stack(
            [torch.cat([matrix(expert, "gate"), matrix(expert, "up")]) for expert in experts]
        )
        tensors[f"{prefix}.down_proj"] = torch.stack([matrix(expert, "down") for expert in experts])


def recipe(method: str = "linear", models: str = "ab", base: bool = False, **more: object) -> dict:
    """A recipe of these models with weights 0.5, 0.3, 0.4."""
    entries = [{"model": name, "parameters": {"weight": weight}} for name, weight in zip(models, (0.5, 0.3, 0.4))]
    return {"merge_method": method, "models": entries} | ({"base_model": "base"} if base else {}) | more


def write_recipe(path: Path, content: dict) -> Path:
    """A recipe as a YAML file."""
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
