"""Initial weights from the seed, another run or a Hugging Face folder; and other ways to start a run."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tests.training.run_files import metrics, refuse, train
from tests.training.run_files import state as saved_state
from trinity.config.load import OmegaConf, build_config
from trinity.errors import UserError
from trinity.interop import export_hf
from trinity.parallel import mesh
from trinity.run_directory import RunDirectory, newest_config
from trinity.training.load_run import load_model
from trinity.training.resume import find_origin
from trinity.training.trainer import Trainer

ROOT = Path(__file__).parents[2]


def first_state(settings: dict, *words: str) -> dict[str, torch.Tensor]:
    """The state of a run before its first step."""
    raw = [("test", OmegaConf.create(settings)), ("test", OmegaConf.from_dotlist(list(words)))]
    config = build_config(raw)
    directory = RunDirectory(Path(config.run.dir))
    ranks = mesh.start(config.parallel, config.model, config.run.threads, False)
    trainer = Trainer(config, ranks, directory, find_origin(config, [], directory.path, print))
    try:
        return {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
                for name, tensor in trainer.state().items()}  # fmt: skip
    finally:
        trainer.close()
        directory.release()
        mesh.stop()


@pytest.mark.parametrize("keep", ["weights", "optimizer", "all"])
def test_fork_another_run(settings: dict, uninterrupted: Path, keep: str) -> None:
    """What is kept is equal bit for bit, and what is not kept is as in a fresh run."""
    fresh = first_state(settings)
    forked = first_state(settings, f"init.run={uninterrupted}", "init.step=6", f"init.keep={keep}")
    source = saved_state(uninterrupted, 6)
    kept = {"weights": ("model.",), "optimizer": ("model.", "optim."), "all": ("",)}[keep]
    of_step_0 = {name for name in forked if name.startswith("run.forgetting.")}  # of continued runs alone
    for name, tensor in forked.items():
        if name in of_step_0:
            continue
        assert torch.equal(tensor, (source if name.startswith(kept) else fresh)[name]), name
    assert not torch.equal(source["model.embed.weight"], fresh["model.embed.weight"])


def test_fork_with_keep_all_continues(settings: dict, uninterrupted: Path) -> None:
    """A fork that keeps everything makes the same steps as the other run."""
    settings["init"] = {"run": str(uninterrupted), "step": 6, "keep": "all"}
    assert train(settings) == 0
    assert metrics(Path(settings["run"]["dir"])) == metrics(uninterrupted)[6:]


def test_start_from_hugging_face(settings: dict, uninterrupted: Path, tmp_path: Path) -> None:
    """An exported folder brings its weights, its balancing bias and its tokenizer; momenta begin at zero."""
    model, config, _ = load_model(uninterrupted)
    export_hf(model, tmp_path / "hf", Path(config.data.tokenizer), dtype=torch.float32)
    with pytest.raises(UserError, match=r"has no config\.yaml, but config\.json: it is a Hugging Face folder"):
        load_model(tmp_path / "hf")
    del settings["data"]["tokenizer"]
    state = first_state(settings, f"init.hf={tmp_path / 'hf'}")
    for name, tensor in model.state_dict().items():
        expected = torch.zeros_like(tensor) if name.endswith("expert_momentum") else tensor
        assert torch.equal(state[f"model.{name}"], expected), name
    assert train(settings, f"init.hf={tmp_path / 'hf'}", "run.steps=1") == 0
    assert "validation_loss.held_out" in metrics(Path(settings["run"]["dir"]))[0]
    assert "validation_bits_per_byte.held_out" in metrics(Path(settings["run"]["dir"]))[0]


def test_invalid_init(settings: dict, tmp_path: Path) -> None:
    """A folder that is no run, a run without that step, a model of other sizes: each one sentence."""
    with pytest.raises(UserError, match="is not a run directory"):
        train(settings, f"init.run={tmp_path}")
    with pytest.raises(UserError, match=r"does not exist|config\.json"):
        train(settings, f"init.hf={tmp_path / 'nowhere'}")


def test_fork_of_other_sizes(settings: dict, uninterrupted: Path) -> None:
    """A size that is given beside init is compared at once; where all are, the tensor that does not fit is named."""
    sentence = refuse(settings, f"init.run={uninterrupted}", "model.expert_width=20")
    assert sentence.startswith(f"model.expert_width=20 in test is not the 16 of init.run={uninterrupted}; leave model.")
    settings["model"] = asdict(newest_config(uninterrupted).model)
    assert "does not fit this run's config" in refuse(settings, f"init.run={uninterrupted}", "model.expert_width=20")
    with pytest.raises(UserError, match=r"no complete checkpoint of step 5; it has \[6, 8\]"):
        train(settings, f"init.run={uninterrupted}", "init.step=5")


@pytest.mark.slow
def test_torchrun_gives_the_same_bits(settings: dict, config_file: Callable, uninterrupted: Path) -> None:
    """The launcher sets OMP_NUM_THREADS to 1; the run sets its own, so nothing differs from plain python."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    result = subprocess.run(
        [*command, "launch/pretrain.py", str(config_file(settings))],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert metrics(Path(settings["run"]["dir"])) == metrics(uninterrupted)


def test_wandb_is_offline_without_a_key(settings: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """log.wandb switches it on; without an API key it never prompts and needs no network."""
    pytest.importorskip("wandb", reason="needs the package wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert train(settings, "log.wandb=tiny", "run.steps=2") == 0
    assert list(Path(settings["run"]["dir"]).glob("wandb/offline-run-*"))


def test_export_in_the_loop(settings: dict, uninterrupted: Path) -> None:
    """export.every writes folders with transformers' tensor names, in addition to checkpoints."""
    assert train(settings, "export.every=4") == 0
    run = Path(settings["run"]["dir"])
    folders = sorted(path.name for path in (run / "hf").iterdir())
    assert folders == ["step_00000004", "step_00000008"]
    assert (run / "hf/step_00000008/model.safetensors").is_file()
    assert (run / "hf/step_00000008/tokenizer.json").is_file()
    assert metrics(run) == metrics(uninterrupted)


def test_a_start_without_a_checkpoint_is_forgotten(settings: dict) -> None:
    """After a first start of another model that saved nothing, the directory holds the second start's model."""
    settings["checkpoint"] = {"every": 0}
    run = Path(settings["run"]["dir"])
    first_state(settings, "model.expert_width=20")
    assert train(settings, "run.steps=2") == 0
    model, config, step = load_model(run)
    assert (config.model.expert_width, step) == (16, 2)
    assert model.blocks[2].ffn.experts.down.shape == (8, 32, 16)
