"""Runs with train.only: saved and resumed as the uninterrupted one, bit for bit; and what is refused."""

import re
from pathlib import Path

import pytest
import torch

from tests.training.run_files import metrics, refuse, state, train
from trinity.planning.fake_rank import fake_rank, state_bytes
from trinity.planning.mesh_search import check_gpus
from trinity.run_directory import newest_config

ONLY = "train.only=[head,blocks.1.ffn.experts,blocks.*.attention.out,blocks.2.ffn.router]"
WORDS = ("batch.sequences=4", "batch.ramp=[]", "evaluation.every=0", "checkpoint.every=2", "checkpoint.keep=9", ONLY)
TRAINED = {
    "head.weight", "blocks.1.ffn.experts.gate_up", "blocks.1.ffn.experts.down", "blocks.2.ffn.router.weight",
    *(f"blocks.{layer}.attention.out.weight" for layer in range(3)),
}  # fmt: skip


def test_resume(settings: dict, tmp_path: Path) -> None:
    """Stopped after two steps of four and started again; the frozen stay, and no state of them is saved.

    The bytes of gradients and optimizer state are those that the plan has.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    settings["log"] = {"norms_every": 1}
    assert train(settings, *WORDS, f"run.dir={one}", "run.steps=4") == 0
    assert train(settings, *WORDS, f"run.dir={two}", "run.steps=2") == 0
    assert train(settings, *WORDS, f"run.dir={two}", "run.steps=4") == 0
    assert metrics(two) == metrics(one)
    first, last, resumed = state(one, 2), state(one, 4), state(two, 4)
    assert resumed.keys() == last.keys()
    for name, tensor in last.items():
        assert torch.equal(resumed[name], tensor), name
    saved = {name.split(".", 3)[3] for name in last if name.startswith("optim.")}
    assert saved == TRAINED
    for name in (name for name in last if name.startswith("model.")):
        plain = name.removeprefix("model.")
        moves = plain in TRAINED or plain in ("blocks.2.ffn.expert_bias", "blocks.2.ffn.expert_momentum")
        assert torch.equal(first[name], last[name]) != moves, name
    config = newest_config(one)
    with fake_rank(config, check_gpus(config, 1)) as rank:
        planned = state_bytes(rank.model, rank.optimizers)
    saved_bytes = sum(tensor.nbytes for name, tensor in last.items() if name.startswith("optim."))
    assert planned["Muon momentum"] + planned["AdamW moments"] == saved_bytes
    assert planned["gradients"] == sum(last[f"model.{name}"].nbytes for name in TRAINED)
    norms = {name for name in metrics(one)[-1] if name.startswith("update_norm.")}
    assert norms == {f"update_norm.{kind}" for kind in ("matrix", "experts", "router", "head")}
    sentence = refuse(settings, *WORDS[:-1], f"run.dir={two}", "run.steps=6", "train.only=[head]")
    assert "train.only was ['head', 'blocks.1.ffn.experts'" in sentence


def test_optimizer_state_of_another_run(settings: dict, tmp_path: Path) -> None:
    """Fewer modules may start from the state of more; more from that of fewer are refused."""
    full, some, more = (f"run.dir={tmp_path / name}" for name in ("full", "some", "more"))
    words = (*WORDS[:-1], "run.steps=2")
    assert train(settings, *words, full) == 0
    fork = ("init.keep=optimizer", f"init.run={tmp_path / 'full'}")
    assert train(settings, *words, some, *fork, "train.only=[head,embed]") == 0
    before, after = state(tmp_path / "full", 2), state(tmp_path / "some", 2)
    assert {name for name in after if name.startswith("optim.")} < before.keys()
    assert torch.equal(after["model.norm.gain"], before["model.norm.gain"])
    sentence = refuse(settings, *words, more, "init.keep=optimizer", f"init.run={tmp_path / 'some'}")
    assert "lacks optim.adamw.exp_avg" in sentence


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("train.only=[blocks.1.fn]", "train.only names 'blocks.1.fn', which is nothing in this model"),
        ("train.only=['*']", "matches all"),
        ("train.only=[[head]]", r"train.only\[0\]"),
        ("train.only=head", "train.only"),
    ],
)
def test_wrong_names(settings: dict, word: str, sentence: str) -> None:
    """Refused before the run directory is made."""
    assert re.search(sentence, refuse(settings, word))
    assert not Path(settings["run"]["dir"]).exists()


def test_a_bias_that_must_move(settings: dict) -> None:
    sentence = refuse(settings, "train.only=[head]", "train.expert_bias=move")
    assert "freezes the router blocks.1.ffn.router" in sentence
    assert "add blocks.1.ffn.router to train.only, or use train.expert_bias=auto" in sentence
