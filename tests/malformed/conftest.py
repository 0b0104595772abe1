"""Whole inputs that tests spoil, each a copy of its own, and a limit on memory."""

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
    """A folder of whole shards."""
    return shutil.copytree(corpus.folder / "prose", tmp_path / "shards")


@pytest.fixture(scope="session")
def exported(corpus: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with an index of several files, which nobody writes to."""
    model = Trinity(SIZES)
    model.init_weights(1)
    folder = tmp_path_factory.mktemp("exported") / "hf"
    return export_hf(model, folder, corpus.tokenizer, torch.float32)


@pytest.fixture
def hf(exported: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(exported, tmp_path / "hf")


@pytest.fixture(scope="session")
def finished(recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with checkpoints of steps 3 and 6, which nobody writes to."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train(quick(recipe(run)), "run.steps=6") == 0
    return run


def quick(settings: dict) -> dict:
    """Without what costs a start time."""
    settings["data"]["workers"] = 0
    settings["evaluation"] = {"every": 0}
    return settings


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def resumed(run: Path, recipe) -> dict:
    """The settings that resume the copy."""
    return quick(recipe(run)) | {"checkpoint": {"every": 0}}


@pytest.fixture
def little_memory() -> Iterator[None]:
    """While a test runs, this process can take 1 GiB more than it has: what a file only claims is never made."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
