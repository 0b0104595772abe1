"""Runs as models: fp32 masters from the checkpoints of one process and of several ranks; averages along a run."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.interop.small_model import CONFIG
from tests.malformed.refusals import refusal
from tests.merging.conftest import child, tensors_of
from trinity.checkpoint.directory import CheckpointDirectory
from trinity.checkpoint.load import model_state
from trinity.checkpoint.save import save
from trinity.config.load import save_config
from trinity.config.run import DataConfig, RunConfig, RunSection
from trinity.interop import export_hf, load_hf
from trinity.merging import average, merge
from trinity.merging.average_run import choose_steps
from trinity.merging.open_source import open_source
from trinity.optim.decay_weights import DECAYS, decay_weights

STEPS = (2, 4, 6, 8)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def make_run(folder: Path, tokenizer: Path) -> Path:
    """A run with checkpoints of steps 2, 4, 6 and 8, of model `child(step)`."""
    config = RunConfig(run=RunSection(steps=8), model=CONFIG, data=DataConfig(tokenizer=str(tokenizer)))
    folder.mkdir(exist_ok=True)
    save_config(config, folder / "config.yaml")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for step in STEPS:
        save(model_state(child(step)), CheckpointDirectory.at(folder), step, keep=4)
    dist.destroy_process_group()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """A run; read only."""
    return make_run(tmp_path_factory.mktemp("run"), tokenizer)


def test_every_tensor_of_a_run(run: Path, tmp_path: Path) -> None:
    """Whole and by rows, bit for bit those of the export in fp32; the newest step by default."""
    for name, step in ((str(run), 8), (f"{run}@4", 4)):
        export_hf(child(step), tmp_path / f"hf{step}", dtype=torch.float32)
        source = open_source(name)
        expected = tensors_of(tmp_path / f"hf{step}")
        assert source.entries.keys() == expected.keys()
        for tensor, values in expected.items():
            rows = source.read(tensor, 0, source.rows(tensor))
            assert torch.equal(rows.view(values.shape), values)
            assert torch.equal(source.read(tensor, source.rows(tensor) - 1, source.rows(tensor)), rows[-1:])


def test_runs_and_folders_merge(run: Path, tmp_path: Path, tokenizer: Path) -> None:
    """A run and a folder of another run's export; config, tokenizer and special ids from the run."""
    export_hf(child(3), tmp_path / "hf", tokenizer, torch.float32)
    weights = {f"{run}@6": 1, str(tmp_path / "hf"): 3}
    entries = [{"model": name, "parameters": {"weight": weight}} for name, weight in weights.items()]
    merge({"merge_method": "linear", "models": entries}, tmp_path / "out")
    first, second = child(6).state_dict(), child(3).state_dict()
    for name, tensor in load_hf(tmp_path / "out").state_dict().items():
        if not name.endswith("momentum"):
            torch.testing.assert_close(tensor, 0.25 * first[name] + 0.75 * second[name], rtol=1e-6, atol=1e-7)
    for name in ("tokenizer.json", "generation_config.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


@pytest.mark.parametrize(("name", "sentence"), [
    ("{}@5", "no complete checkpoint of step 5; it has [2, 4, 6, 8]"), ("{}/checkpoints", "has neither a config.json"),
])  # fmt: skip
def test_wrong_runs(run: Path, tmp_path: Path, name: str, sentence: str) -> None:
    content = {"merge_method": "passthrough", "models": [{"model": name.format(run)}]}
    assert sentence in refusal(lambda: merge(content, tmp_path / "out"), run, tmp_path)


@pytest.mark.parametrize("decay", ["equal", *DECAYS])
def test_average_is_the_decay_of_the_updates(run: Path, tmp_path: Path, decay: str) -> None:
    """θ_n + Σ w_j u_j in float64, u_j the updates between checkpoints, w_j the decay one interval longer than these."""
    result = average(run, tmp_path / "out", "2:8", decay, dtype=torch.float32)
    assert result.dropped == 0
    models = [child(step).double().state_dict() for step in STEPS]
    scale = {"equal": lambda x: 1 - x, "linear": lambda x: 1 - x, "1-sqrt": lambda x: 1 - x**0.5,
             "cosine": lambda x: 0.5 + 0.5 * math.cos(math.pi * x)}[decay]  # fmt: skip
    for name, tensor in load_hf(tmp_path / "out").state_dict().items():
        if name.endswith("momentum"):
            continue
        expected = models[0][name].clone()
        for number, (before, after) in enumerate(pairwise(models), start=1):
            expected += scale(number / 4) * (after[name] - before[name])
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)


def test_weights_of_uneven_steps() -> None:
    assert decay_weights([10, 20, 30, 40], "linear") == pytest.approx([0.25] * 4)
    assert decay_weights([0, 10, 40], "equal") == pytest.approx([1 / 3] * 3)
    assert decay_weights([0, 10, 40], "linear") == pytest.approx([1 / 6, 1 / 2, 1 / 3])
    for decay in ("equal", *DECAYS):
        assert sum(decay_weights([0, 10, 40, 45], decay)) == pytest.approx(1)


@pytest.mark.parametrize(("words", "steps"), [
    ("2:8", [2, 4, 6, 8]), ("3:7", [4, 6]), ("2:8:3", None), ("4:8:2", [4, 6, 8]), ("2,8", [2, 8]), ([8, 2], [2, 8]),
    ("8:2", None), ("2", None), ("a:b", None), ("2:4:0", None), ("5:5", None), ("2,5", None),
    ("0:99999999999:1", None),
])  # fmt: skip
def test_choice_of_steps(run: Path, words: object, steps: list[int] | None) -> None:
    if steps is not None:
        assert choose_steps(run, words) == steps
    else:
        assert "steps" in refusal(lambda: choose_steps(run, words), run) or "step 5" in refusal(
            lambda: choose_steps(run, words), run
        )


def test_newest_checkpoint_gives_the_type_of_an_average(run: Path, tmp_path: Path) -> None:
    average(run, tmp_path / "out", [2, 4])
    tensors = tensors_of(tmp_path / "out")
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.3.mlp.expert_bias"].dtype == torch.float32
