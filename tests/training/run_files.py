"""Start runs in this process, and read the files that they leave."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner

from trinity.checkpoint.load import empty_tensors, load
from trinity.config.load import OmegaConf, build_config
from trinity.errors import UserError
from trinity.io.remote_path import AnyPath
from trinity.training.trainer import pretrain

# The fields of metrics.jsonl that say how long and how much, not what; and those that depend on the number of ranks.
MEASURED = {
    "step_seconds", "data_seconds", "goodput", "checkpoint_seconds", "tokens_per_second", "memory_gib", "mfu",
    "rank_seconds_spread",
}  # fmt: skip
OF_THE_MESH = {"attention_spread"}


def train(settings: dict, *words: str, accept: tuple[str, ...] = ()) -> int:
    """Run the settings in this process, as launch/pretrain.py does; returns the exit code."""
    raw = [("test", OmegaConf.create(settings)), ("test", OmegaConf.from_dotlist(list(words)))]
    return pretrain(build_config(raw), list(accept))


def refuse(settings: dict, *words: str) -> str:
    """Run in this process, check that the run is refused, and return the error message."""
    with pytest.raises(UserError) as mistake:
        train(settings, *words)
    sentence = str(mistake.value)
    assert "\n" not in sentence
    return sentence


def metrics(run: Path) -> list[dict]:
    """metrics.jsonl without times, memory, and what depends on the mesh."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED | OF_THE_MESH} for line in lines]


def status(run: Path) -> dict:
    """status.json."""
    return json.loads((run / "status.json").read_text())


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by name."""
    tensors: dict = {}
    reader = dcp.FileSystemReader(run / "checkpoints" / f"step_{step:08d}")
    dcp.state_dict_loader._load_state_dict(tensors, reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return tensors


def checkpoint_bytes(path: AnyPath) -> dict[str, bytes]:
    """The bytes of every tensor of a checkpoint, local or remote."""
    tensors = empty_tensors(path, "")
    load(tensors, path)
    return {name: tensor.flatten().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
