"""With init.hf or init.run the model's sizes are those of the folder or run; another given size is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trinity.config import ZOO, ModelConfig, load_config, save_config
from trinity.config.hf_config import to_hf_config
from trinity.config.paths import check_paths
from trinity.errors import UserError

Write = Callable[[str], Path]
SIZES = replace(ZOO["smoke"], width=64, layers=3, heads=2, experts=6, rope_theta=5000.0, max_positions=77)


def folder_of(path: Path, sizes: ModelConfig) -> Path:
    """A Hugging Face folder without weights."""
    path.mkdir()
    content = to_hf_config(sizes, bos_id=None, eos_id=None, pad_id=None, dtype=torch.float32)
    (path / "config.json").write_text(json.dumps(content))
    return path


def run_of(path: Path, sizes: ModelConfig, write: Write) -> Path:
    """A run directory without checkpoints."""
    path.mkdir()
    config = load_config(write("run: {steps: 1}"))
    config.model = sizes
    save_config(config, path / "config.yaml")
    return path


@pytest.mark.parametrize("key", ["hf", "run"])
def test_init_sets_the_sizes(write: Write, tmp_path: Path, key: str) -> None:
    """It wins over model.name; a model of the zoo gets its name; equal sizes may be given."""
    make = folder_of if key == "hf" else lambda path, sizes: run_of(path, sizes, write)
    small, nano = make(tmp_path / "small", SIZES), make(tmp_path / "nano", ZOO["nano"])
    path = write("run: {steps: 1}\nmodel: {name: mini}\n")
    assert load_config(path, [f"init.{key}={small}"]).model == replace(SIZES, name="mini")
    assert load_config(path, [f"init.{key}={small}", "model.width=64", "model.max_positions=9"]).model == replace(
        SIZES, name="mini", max_positions=9
    )
    assert load_config(path, [f"init.{key}={nano}"]).model == ZOO["nano"]
    assert load_config(path, [f"init.{key}={small}", f"init.{key}=null"]).model == ZOO["mini"]


@pytest.mark.parametrize("key", ["hf", "run"])
def test_a_missing_folder(write: Write, tmp_path: Path, key: str) -> None:
    """model.name stands in for it, to plan; the start of a run refuses it. Without model.name no size is known."""
    words = [f"init.{key}={tmp_path / 'none'}"]
    config = load_config(write("run: {steps: 1}\nmodel: {name: mini, layers: 9}\n"), words)
    assert config.model == replace(ZOO["mini"], layers=9)
    for refused in (lambda: check_paths(config, fresh=True), lambda: load_config(write("run: {steps: 1}\n"), words)):
        with pytest.raises(UserError, match=rf"init\.{key}=.*none does not exist"):
            refused()


def test_another_size_is_refused_naming_both(write: Write, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "hf", SIZES)
    path = write(f"run: {{steps: 1}}\nmodel: {{experts: 8}}\ninit: {{hf: {folder}}}\n")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value) == (
        f"model.experts=8 in {path} is not the 6 of init.hf={folder}; leave model.experts out, or start from another "
        "model"
    )
    with pytest.raises(UserError, match=r"^model\.width=65 in the command line is not the 64 of init\.hf"):
        load_config(path, ["model.experts=6", "model.width=65"])


def test_a_saved_config_does_not_read_init(write: Write, tmp_path: Path) -> None:
    """Nor does the command that resumes the run: its own directory has the sizes."""
    folder, run = folder_of(tmp_path / "hf", SIZES), tmp_path / "run"
    words = [f"init.hf={folder}", f"run.dir={run}"]
    path = write("run: {steps: 1}")
    config = load_config(path, words)
    run.mkdir()
    save_config(config, run / "config.yaml")
    folder.rename(tmp_path / "moved")
    assert load_config(run / "config.yaml") == config
    assert load_config(path, words) == config
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match=rf"^init\.hf={folder} does not exist; "):
        load_config(path, words)


def test_init_without_a_model(write: Write, tmp_path: Path) -> None:
    path = write("run: {steps: 1}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty/config\.json does not exist; give a folder written by transformers"):
        load_config(path, [f"init.hf={tmp_path / 'empty'}"])
    with pytest.raises(UserError, match=r"empty is not a run directory: it has no config\.yaml"):
        load_config(path, [f"init.run={tmp_path / 'empty'}"])
    (tmp_path / "empty/config.yaml").write_text("model: 5")
    with pytest.raises(UserError, match=r"config\.yaml describes no model"):
        load_config(path, [f"init.run={tmp_path / 'empty'}"])
