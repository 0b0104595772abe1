"""The safe unpickler of .metadata: reads what the library writes, and refuses everything else without running it."""

import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from trinity.checkpoint.directory import CheckpointDirectory
from trinity.checkpoint.load import Reader, empty_tensors, load, read_metadata
from trinity.checkpoint.save import save
from trinity.errors import UserError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]


class PickledCall:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable, *words: object) -> None:
        self.call = function, words

    def __reduce__(self) -> tuple:
        return self.call


@pytest.fixture(scope="module")
def saved_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a checkpoint with every dtype, shape and placement that a run may save."""
    checkpoints = CheckpointDirectory.at(tmp_path_factory.mktemp("run"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1, 1))
    state = {f"data.{dtype}": torch.ones(3, dtype=dtype) for dtype in DTYPES}
    state |= {"model.sharded": distribute_tensor(torch.ones(4, 2), mesh, [Replicate(), Shard(0)])}
    state |= {"run.scalar": torch.tensor(3), "run.nothing": torch.empty(0, 5), "run.turned": torch.ones(3, 2).T}
    save(state, checkpoints, 1, keep=1)
    dist.destroy_process_group()
    return checkpoints.path_of(1)


def test_metadata_equals_an_ordinary_unpickler(saved_folder: Path) -> None:
    """Names, shapes, dtypes and places equal those that pickle.loads returns."""
    path = saved_folder / ".metadata"
    metadata, expected = read_metadata(path), pickle.loads(path.read_bytes())
    assert metadata.state_dict_metadata == expected.state_dict_metadata
    assert metadata.storage_data == expected.storage_data
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in empty_tensors(saved_folder, "").items()}
    assert shapes["data.torch.bfloat16"] == ((3,), torch.bfloat16)
    assert shapes["model.sharded"] == ((4, 2), torch.float32)
    assert len(shapes) == len(DTYPES) + 4


@pytest.mark.parametrize(
    ("function", "words", "name"),
    [
        (os.system, "touch TRAP", "posix.system"), (eval, "open('TRAP', 'w')", "builtins.eval"),
        (os.mkdir, "TRAP", "posix.mkdir"), (torch.load, "TRAP", "torch.serialization.load"),
        (getattr, "TRAP", "builtins.getattr"), (Path, "TRAP", "pathlib.Path"),
    ],
)  # fmt: skip
def test_malicious_pickle(saved_folder: Path, tmp_path: Path, function: Callable, words: str, name: str) -> None:
    """A call hidden in an otherwise correct .metadata: refused by its name, before anything is called."""
    trap, folder = tmp_path / "sprung", tmp_path / "step_00000001"
    description = pickle.loads((saved_folder / ".metadata").read_bytes())
    description.planner_data = PickledCall(function, words.replace("TRAP", str(trap)))
    folder.mkdir(parents=True)
    path = folder / ".metadata"
    path.write_bytes(pickle.dumps(description))
    for read in (lambda: Reader(folder), lambda: empty_tensors(folder, "model."), lambda: load({}, folder)):
        with pytest.raises(UserError) as refusal:
            read()
        assert str(refusal.value).startswith(f"{path} names '{name}', which no checkpoint needs")
    assert not trap.exists()


@pytest.mark.parametrize("value", [None, 3, {"a": 1}, Metadata({}), [Metadata({})]])
def test_pickle_of_another_type(tmp_path: Path, value: object) -> None:
    """A harmless pickle that does not describe a checkpoint is refused."""
    (tmp_path / ".metadata").write_bytes(pickle.dumps(value))
    with pytest.raises(UserError, match="does not describe a checkpoint"):
        Reader(tmp_path)


def test_damaged_pickle(saved_folder: Path, tmp_path: Path) -> None:
    """Truncated anywhere, or with any byte changed: either read, or refused in one sentence."""
    whole = (saved_folder / ".metadata").read_bytes()
    chance, path = random.Random(1), tmp_path / ".metadata"
    refused = []
    for _ in range(300):
        content = bytearray(whole)
        content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content[: chance.choice([None, chance.randrange(len(content))])])
        try:
            read_metadata(path)
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert all(str(path) in sentence and "\n" not in sentence for sentence in refused)
