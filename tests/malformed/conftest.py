"""Valid inputs for tests to damage, each test with its own copy, and a memory limit."""

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.malformed.refusals import train
from trinity.interop import export_hf
from trinity.models import ModelConfig, Trinity

SIZES = ModelConfig(
    vocab_size=400, width=16, layers=4, dense_layers=1, dense_width=24, heads=2, kv_heads=1, head_dim=8, window=5,
    experts=3, active_experts=2, expert_width=8, max_positions=32,
)  # fmt: skip


@pytest.fixture
def shards(corpus: SimpleNamespace, tmp_path: Path) -> Path:
    """A folder of valid shards."""
    return shutil.copytree(corpus.folder / "prose", tmp_path / "shards")


@pytest.fixture(scope="session")
def exported(corpus: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of several files with an index; read only."""
    model = Trinity(SIZES)
    model.init_weights(1)
    folder = tmp_path_factory.mktemp("exported") / "hf"
    return export_hf(model, folder, corpus.tokenizer, torch.float32)


@pytest.fixture
def hf(exported: Path, tmp_path: Path) -> Path:
    """A copy of `exported`."""
    return shutil.copytree(exported, tmp_path / "hf")


@pytest.fixture(scope="session")
def finished(recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with checkpoints of steps 3 and 6; read only."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train(without_slow_parts(recipe(run)), "run.steps=6") == 0
    return run


def without_slow_parts(settings: dict) -> dict:
    """Settings without data workers and evaluation, which make a start slow."""
    settings["data"]["workers"] = 0
    settings["evaluation"] = {"every": 0}
    return settings


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished`."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def resumed(run: Path, recipe) -> dict:
    """The settings that resume `run`."""
    return without_slow_parts(recipe(run)) | {"checkpoint": {"every": 0}}


@pytest.fixture
def limited_memory() -> Iterator[None]:
    """Limit this process to 1 GiB more memory, so that allocating a size that a file merely claims fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
