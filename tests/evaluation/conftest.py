"""A briefly trained model: the folder exported from its run, and its validation loss at that step."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trinity.config import RunConfig
from trinity.interop import export_hf, load_hf
from trinity.models import Trinity
from trinity.training.load_run import load_model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One CPU thread, so that sums keep their order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of text indexes for each test."""
    monkeypatch.setenv("TRINITY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def finished(uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """config of a finished run, the folder of its last step in fp32, and the last line of metrics.jsonl."""
    model, config, _ = load_model(uninterrupted)
    folder = export_hf(model, tmp_path_factory.mktemp("hf") / "last", Path(config.data.tokenizer), torch.float32)
    last = json.loads((uninterrupted / "metrics.jsonl").read_text().splitlines()[-1])
    return SimpleNamespace(config=config, folder=folder, last=last)


@pytest.fixture(scope="session")
def config(finished: SimpleNamespace) -> RunConfig:
    """The run's config."""
    return finished.config


@pytest.fixture(scope="session")
def exact(finished: SimpleNamespace) -> Trinity:
    """The model in float64."""
    return load_hf(finished.folder).double()
