"""Unknown keys: synonyms, typing errors and keys of other sections get suggestions; otherwise the section is listed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from trinity.config import load_config
from trinity.config.key_suggestions import SYNONYMS, all_keys, nearest_keys, unknown_key_hint
from trinity.errors import UserError

KEYS = list(all_keys())


def test_every_suggestion_exists() -> None:
    """Every key of SYNONYMS exists, every synonym is listed once, and an existing key suggests itself."""
    words = [word for group in SYNONYMS for word in group]
    assert len(set(words)) == len(words)
    for group, keys in SYNONYMS.items():
        assert set(keys) <= set(KEYS), keys
        for word in group:
            assert word == word.lower()
            assert word not in KEYS or keys == (word,)


def test_every_synonym_finds_its_key_at_every_level() -> None:
    """Alone, in a section that does not exist, and in every section that has no such key itself."""
    for group, keys in SYNONYMS.items():
        for word in group:
            assert nearest_keys(word, KEYS) == ([word] if word in KEYS else list(keys)), word
            assert set(nearest_keys(f"zzz.{word}", KEYS)) <= set(keys), word
            for key in keys:
                section = key.rpartition(".")[0]
                if section and f"{section}.{word}" not in KEYS:
                    assert key in nearest_keys(f"{section}.{word}", KEYS), (section, word)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("optim.muon.learning_rate", "optim.muon.lr"), ("optim.adamw.learning_rate", "optim.adamw.lr"),
        ("optim.learning_rate", "optim.muon.lr or optim.adamw.lr"), ("lr", "optim.muon.lr or optim.adamw.lr"),
        ("model.top_k", "model.active_experts"), ("model.n_experts", "model.experts"),
        ("model.hidden_size", "model.width"), ("training.max_steps", "run.steps"), ("run.max_steps", "run.steps"),
        ("model.num_hidden_layers", "model.layers"), ("data.max_seq_len", "data.sequence_length"),
        ("optim.max_grad_norm", "optim.clip_norm"), ("optim.warmup_ratio", "optim.schedule.warmup_steps"),
        ("optim.adamw.beta1", "optim.adamw.betas"), ("gradient_checkpointing", "recompute"),
        ("wandb_project", "log.wandb"), ("model.Width", "model.width"), ("model.kv-heads", "model.kv_heads"),
        ("sequence_length", "data.sequence_length"), ("optim.sequences", "batch.sequences or evaluation.sequences"),
        ("muon", "optim.muon"), ("schedule", "optim.schedule"), ("optim.steps", "optim.muon.steps"),
        ("learning_rte", "optim.muon.lr or optim.adamw.lr"), ("rum", "run"), ("run.sede", "run.seed"),
        ("data.num_experts_per_tok", "model.active_experts"), ("optim.muon.betas", "optim.adamw.betas"),
        ("run.step", "run.steps or init.step"), ("profile.step", "profile.steps or init.step"),
        ("model.expert", "model.experts or parallel.expert"), ("init.steps", "init.step or run.steps"),
        ("parallel.experts", "parallel.expert or model.experts or kernels.experts"),
        ("optim.adamw.ep", "optim.adamw.eps or parallel.expert"), ("optim.muon.step", "optim.muon.steps or init.step"),
        ("batch.size", "batch.sequences"), ("checkpoint.interval", "checkpoint.every"),
        ("evaluation.interval", "evaluation.every"), ("eval.steps", "evaluation.every"), ("data.path", "data.train"),
        ("model.size", "model.name"), ("batch.accumulation", "batch.microbatch"),
        ("gradient_accumulation_steps", "batch.microbatch"), ("batch.gradient_accumulation", "batch.microbatch"),
    ],
)  # fmt: skip
def test_suggestions(key: str, expected: str) -> None:
    assert unknown_key_hint(key) == f"did you mean {expected}?"


@pytest.mark.parametrize("key", ["optim.muon.zzz", "optim.muon.rotation", "loss.quux", "zzz", "export.foo"])
def test_no_similar_key(key: str) -> None:
    """No suggestion: the keys of the section in their order, or the sections."""
    section = key.rpartition(".")[0]
    lists = {
        "optim.muon": "optim.muon has lr, momentum, nesterov, weight_decay, coefficients, steps, dtype, starved, wire, "
        "share",
        "loss": "loss has z, per", "export": "export has every",
        "": "it must begin with one of run, model, init, data, batch, optim, balancing, loss, parallel, kernels, "
        "precision, recompute, compile, train, checkpoint, export, evaluation, profile, log, health",
    }  # fmt: skip
    assert unknown_key_hint(key) == lists[section]


def test_suggestions_for_files_and_overrides(tmp_path: Path, write: Callable[[str], Path]) -> None:
    """For an unknown section, its keys are compared; an entry of a list has its own keys."""

    def refusal(content: str, *words: str) -> str:
        with pytest.raises(UserError) as caught:
            load_config(write(content), list(words))
        return str(caught.value)

    path = tmp_path / "run.yaml"
    sentence = refusal("run: {steps: 1}\ntraining: {learning_rate: 1}")
    assert sentence == (
        f"training.learning_rate in {path} is not a known key; did you mean optim.muon.lr or optim.adamw.lr?"
    )
    sentence = refusal("run: {steps: 1}", "lr=1e-3")
    assert sentence == "lr in the command line is not a known key; did you mean optim.muon.lr or optim.adamw.lr?"
    assert refusal("run: {steps: 1}\nbatch: {ramp: [{tokens: 5, sequence: 3}]}").endswith("Did you mean: 'sequences'?")
    assert refusal("run: {steps: 1}", "data.phases=[{tokens: 5, qqq: 3}]").endswith(
        "; an entry has tokens, mixture, sequence_length, packing, rsdb_size, length_bias"
    )
