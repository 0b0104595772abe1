"""Files written by version 0.1 still load: a run directory with a checkpoint, and a Hugging Face folder.

Both were written at commit 2c6ed28 from the shards and the tokenizer beside them. In the config, OLD is
replaced by their folder.
"""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner

from tests.training.run_files import metrics
from trinity.checkpoint.directory import CheckpointDirectory
from trinity.checkpoint.load import empty_tensors, load
from trinity.config import load_config
from trinity.interop import export_hf, load_hf
from trinity.training.load_run import load_model
from trinity.training.trainer import pretrain

SAVED = Path(__file__).parents[1] / "data" / "run_of_version_0_1"
STEP = 3
# float64 throughout, so another CPU's order of sums moves a metric by some 1e-13 of itself, which the three steps'
# Newton-Schulz iterations may amplify a hundredfold; float32 parts (the biases) hold nothing that is not exact there.
TOLERANCE = 1e-9


@pytest.fixture
def old_folder(tmp_path: Path) -> Path:
    """A copy of the folder whose config names its own files."""
    folder = tmp_path / "old"
    shutil.copytree(SAVED, folder)
    config = folder / "run" / "config.yaml"
    config.write_text(config.read_text().replace("OLD", str(folder)))
    return folder


def test_every_tensor_is_read_bit_for_bit(old_folder: Path) -> None:
    """Loading returns the tensors that the library alone returns."""
    path = CheckpointDirectory.at(old_folder / "run").path_of(STEP)
    expected: dict = {}
    reader = dcp.FileSystemReader(path)
    dcp.state_dict_loader._load_state_dict(expected, reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    tensors = empty_tensors(path, "")
    load(tensors, path)
    assert tensors.keys() == expected.keys()
    assert len(tensors) > 100
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def test_load_model(old_folder: Path) -> None:
    """load_model, as tools/generate.py and export_hf.py call it, equals the export written then, in fp32."""
    model, _, step = load_model(old_folder / "run")
    assert step == STEP
    tensors = {name: tensor.float() for name, tensor in model.state_dict().items()}
    for name, tensor in load_hf(old_folder / "hf").state_dict().items():
        if not name.endswith("expert_momentum"):  # no export holds it
            assert torch.equal(tensor.float(), tensors[name]), name


def test_export_is_the_same_byte_for_byte(old_folder: Path, tmp_path: Path) -> None:
    """Names, shapes, order and metadata of the safetensors file, and the config beside it."""
    export_hf(load_hf(old_folder / "hf"), tmp_path / "again", old_folder / "tokenizer", dtype=torch.float32)
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (old_folder / "hf" / name).read_bytes(), name
    assert len(safetensors.torch.load_file(old_folder / "hf" / "model.safetensors")) == 73


NEW_FIELDS = ("attention_spread", "validation_max_violation", "validation_dead_experts")
"""Fields of metrics.jsonl that the version did not have."""


def test_resume_gives_the_same_steps(old_folder: Path) -> None:
    """From step 3 to step 6: data, counts and routing exactly, floats within TOLERANCE."""
    run = old_folder / "run"
    before = metrics(run)
    assert pretrain(load_config(run / "config.yaml"), []) == 0
    after = metrics(run)
    assert len(before) == len(after) == 6
    for old_line, line in zip(before, after):
        new = {name for name in line if name.startswith(NEW_FIELDS)}
        assert set(line) - new == set(old_line)
        for name, value in old_line.items():
            expected = pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE) if isinstance(value, float) else value
            assert line[name] == expected, (line["step"], name)
    routed = [json.loads(line)["load"] for line in (run / "router.jsonl").read_text().splitlines()]
    routed_then = [json.loads(line)["load"] for line in (SAVED / "run" / "router.jsonl").read_text().splitlines()]
    assert routed == routed_then
