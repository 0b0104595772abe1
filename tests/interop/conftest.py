"""One small model with every kind of tensor, a folder exported from it, and a tokenizer that fits."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.interop.small_model import CONFIG, make_model
from trinity.data.tokenizer.tokenizer import save_tokenizer, train_tokenizer
from trinity.interop import export_hf
from trinity.models import Trinity
from trinity.parallel.mesh import Ranks, Sizes, join_meshes


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One CPU thread, so that sums keep their order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> Trinity:
    """The model."""
    return make_model()


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two rows of tokens."""
    return torch.randint(CONFIG.vocab_size, (2, 19), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def exported(model: Trinity, tmp_path: Path) -> Path:
    """A folder with the model in fp32, in several files."""
    return export_hf(model, tmp_path / "exported", dtype=torch.float32, max_shard_bytes=20_000)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 280 tokens, fewer than the model's 300 rows, as with a padded vocabulary."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(
        train_tokenizer(["the rain in Spain stays mainly in the plain; plainly the rain in Spain stays"] * 2, 280),
        folder,
    )
    return folder


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    """A mesh of one process, with a process group for the duration of the test."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield join_meshes(Sizes(1, 1, 1, 1, "experts"), torch.device("cpu"))
    dist.destroy_process_group()
