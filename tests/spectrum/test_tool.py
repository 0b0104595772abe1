"""tools/spectrum.py as a user calls it: results, an interrupted scan, translation, and wrong input."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.merging.test_tools import call
from trinity.models import Trinity
from trinity.models.freeze import trained_parameters
from trinity.spectrum import scan as scan_module
from trinity.spectrum.modules import open_weights
from trinity.spectrum.scores import score_matrix


def results(out: Path) -> dict:
    return json.loads((out / "spectrum.json").read_text())


def test_whole(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Every file, the scores of each matrix, and the memory by hand from the parameters that train."""
    assert call("spectrum.py", folder, "--top", 40, "--device", "cpu", "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    only = yaml.safe_load((tmp_path / "train_only.yaml").read_text())["train"]["only"]
    source = open_weights(str(folder))
    sizes = {name: parameter.numel() for name, parameter in Trinity(source.config).named_parameters()}
    trained = sum(sizes[name] for name in trained_parameters(list(sizes), only))
    adamw = 2 * 4 * 2 * source.config.vocab_size * source.config.width  # embedding and head; no gain trains
    muon = 4 * (trained - adamw // 8)
    state = {
        line.split()[0]: line.split()[1:] for line in printed.splitlines() if line[:5] in ("gradi", "optim", "param")
    }
    assert state["parameters"] == [f"{4 * sum(sizes.values()) / 1e9:.3f}"] * 2
    assert float(state["gradients"][1]) == pytest.approx(4 * trained / 1e9, abs=1e-3)
    assert float(state["optimizer"][1]) == pytest.approx((muon + adamw) / 1e9, abs=1e-3)
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    for name in ("model.layers.3.self_attn.v_proj.weight", "model.layers.4.mlp.experts.5.up_proj.weight"):
        score = score_matrix(source.read(name, 0, source.rows(name)))
        assert scores[name] == pytest.approx(list(score), rel=1e-6)
    assert [unit["name"] for unit in results(tmp_path)["units"] if unit["trained"]] == only
    ties = Counter(
        unit["type"] for unit in results(tmp_path)["units"]
        if unit["trained"] and unit["mp"] == 0 and unit["name"] not in ("embed", "head")
    )  # fmt: skip
    (note,) = [line for line in printed.splitlines() if line.startswith("note:")]
    assert ties
    assert ": " + ", ".join(f"{kind} {count}" for kind, count in ties.items()) + ";" in note
    page = (tmp_path / "spectrum.html").read_text()
    assert page.count("class=figure data-figure") == page.count('style="height: ') == 2
    assert "Scores by layer and module" in page
    assert "\n".join(only) in page


def test_exact_memory(folder: Path, tmp_path: Path) -> None:
    """In bytes: no gradient and no moment of a frozen parameter."""
    from trinity.config.run import RunConfig, TrainConfig
    from trinity.planning.fake_rank import fake_rank, state_bytes
    from trinity.planning.mesh_search import check_gpus

    config = RunConfig(model=open_weights(str(folder)).config, train=TrainConfig(["head", "blocks.3.attention"]))
    with fake_rank(config, check_gpus(config, 1)) as rank:
        state = state_bytes(rank.model, rank.optimizers)
    sizes = {name: parameter.numel() for name, parameter in Trinity(config.model).named_parameters()}
    head, gains = sizes["head.weight"], sum(sizes[f"blocks.3.attention.{name}_norm.gain"] for name in "qk")
    matrices = sum(sizes[f"blocks.3.attention.{name}.weight"] for name in ("qkvg", "out"))
    assert state["gradients"] == 4 * (head + gains + matrices)
    assert state["Muon momentum"] == 4 * matrices
    assert state["AdamW moments"] == 8 * (head + gains) + 4 * 3  # and the step counts of three tensors
    assert state["parameters"] == 4 * sum(sizes.values())


def test_interrupted_scan_continues(folder: Path, tmp_path: Path) -> None:
    """After a failure at the 40th matrix none of the 39 is scored again, and the results are the same."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call("spectrum.py", folder, "--device", "cpu", "--out", whole) == 0
    counted: list[int] = []

    def fail_at(limit: int) -> Callable:
        def score(weight: torch.Tensor) -> object:
            counted.append(1)
            if len(counted) == limit:
                raise KeyboardInterrupt
            return score_matrix(weight)

        return score

    with mock.patch.object(scan_module, "score_matrix", fail_at(40)), pytest.raises(KeyboardInterrupt):
        scan_module.scan(*scan_words(folder, parts))
    with mock.patch.object(scan_module, "score_matrix", fail_at(10**9)):
        assert call("spectrum.py", folder, "--device", "cpu", "--out", parts) == 0
    assert len(counted) == 40 + len(json.loads((whole / "scores.json").read_text())["scores"]) - 39
    for name in ("spectrum.json", "scores.json", "train_only.yaml", "axolotl.yaml"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def scan_words(folder: Path, out: Path) -> tuple:
    from trinity.spectrum.modules import find_modules

    source = open_weights(str(folder))
    out.mkdir()
    return source, find_modules(source), None, "cpu", out / "scores.json"


def test_samples_and_the_other_score(folder: Path, tmp_path: Path) -> None:
    """A sample of experts, then the rest: scores are kept for both."""
    assert call("spectrum.py", folder, "--sample", 2, "--device", "cpu", "--out", tmp_path, "--score", "spectrum") == 0
    few = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert sum("experts.0.down" in name for name in few) == 3
    assert not any("experts.1.down" in name for name in few)
    assert call("spectrum.py", folder, "--device", "cpu", "--out", tmp_path) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert few.items() <= scores.items()
    assert any("experts.1.down" in name for name in scores)


def test_another_architecture(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Only axolotl's list; experts of any folder are stacks; biases are no modules."""
    assert call("spectrum.py", dense, "--top", 25, "--device", "cpu", "--out", tmp_path) == 0
    assert not (tmp_path / "train_only.yaml").exists()
    entries = yaml.safe_load((tmp_path / "axolotl.yaml").read_text())["unfrozen_parameters"]
    assert sum("q_proj" in entry for entry in entries) == 1
    assert sum("experts" in entry for entry in entries) == 2
    assert "^lm_head.weight$" in entries
    assert not [entry for entry in entries if "bias" in entry]
    assert {module["module"] for module in results(tmp_path)["modules"]} >= {"model.layers.2.moe.experts.*.w1"}
    assert call("spectrum.py", dense, "--axolotl", tmp_path / "axolotl.yaml", "--out", tmp_path) == 2
    assert "is no Trinity model, so train.only has no names in it" in capsys.readouterr().err


def test_translation(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """axolotl's list becomes a section of a config, without scores; the list itself may be in OUT, and stays."""
    text = "unfrozen_parameters: [^lm_head.weight$, 'model.layers.[23].self_attn.q_proj'] # by hand"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "axolotl.yaml").write_text(text)
    words = ["--axolotl", tmp_path / "out" / "axolotl.yaml", "--out", tmp_path / "out"]
    assert call("spectrum.py", folder, *words) == 0
    assert (tmp_path / "out" / "axolotl.yaml").read_text() == text
    only = yaml.safe_load((tmp_path / "out" / "train_only.yaml").read_text())["train"]["only"]
    assert only == ["blocks.2.attention.qkvg", "blocks.3.attention.qkvg", "head"]
    assert not (tmp_path / "out" / "scores.json").exists()
    assert "gradients" in capsys.readouterr().out


WRONG: dict[str, tuple[list, str]] = {
    "top": (["--top", "0"], "--top 0 must be above 0 and below 100"),
    "all": (["--top", "100"], "--top 100 must be above 0 and below 100"),
    "sample": (["--sample", "0"], "--sample 0 must be at least 1"),
    "device": (["--device", "abacus"], "--device abacus is not available"),
    "axolotl": (["--axolotl", "none.yaml"], "none.yaml does not exist"),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_options(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, words: str) -> None:
    """One sentence and code 2, before any score."""
    options, sentence = WRONG[words]
    assert call("spectrum.py", folder, "--device", "cpu", "--out", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_wrong_folders(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """No folder, no matrix, a NaN, and scores of another model in OUT."""
    assert call("spectrum.py", tmp_path / "nothing") == 2
    bad, out = tmp_path / "bad", tmp_path / "out"
    shutil.copytree(folder, bad)
    assert call("spectrum.py", bad, "--device", "cpu", "--out", out) == 0
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.4.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert call("spectrum.py", bad, "--device", "cpu", "--out", out) == 2
    assert "scores of other weights" in capsys.readouterr().err
    assert call("spectrum.py", bad, "--device", "cpu", "--out", out, "--force") == 2
    assert "holds model.layers.4.self_attn.q_proj.weight with values that are not finite" in capsys.readouterr().err
    (out / "scores.json").write_text("{}")
    assert call("spectrum.py", folder, "--device", "cpu", "--out", out) == 2
    assert "is no file of scores" in capsys.readouterr().err
    shutil.copytree(folder, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file({"a.bias": torch.ones(3)}, tmp_path / "empty" / "model.safetensors", {"format": "pt"})
    assert call("spectrum.py", tmp_path / "empty", "--out", out) == 2
    assert "lacks model.embed_tokens.weight, which its config.json asks for" in capsys.readouterr().err
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    assert call("spectrum.py", tmp_path / "empty", "--out", out) == 2
    assert "holds no matrix to score" in capsys.readouterr().err
