"""Which keys a resumed run may change: a rule for every key, and refusals that name the keys."""

from pathlib import Path

import pytest

from trinity.config import ZOO, RunConfig
from trinity.config.changes import RULES, check_changes, rule_of
from trinity.config.load import flatten
from trinity.config.run import DataPhaseConfig, RampEntryConfig
from trinity.errors import UserError


def refusal(before: RunConfig, now: RunConfig, accepted: list[str], tokens_read: int = 0) -> str:
    with pytest.raises(UserError) as caught:
        check_changes(before, now, tokens_read, accepted, "runs/mine")
    return str(caught.value)


def test_every_setting_has_a_rule() -> None:
    """And every rule is for a key that exists."""
    keys = list(flatten(RunConfig()))
    assert {rule_of(key) for key in keys} == {"free", "accept", "fixed", "content"}
    for prefix in RULES:
        assert any(key == prefix or key.startswith(f"{prefix}.") for key in keys), prefix


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("run.steps", "free"), ("run.tokens", "free"), ("run.seed", "fixed"), ("model.width", "fixed"),
        ("data.streams", "fixed"), ("data.tokenizer", "content"), ("data.train", "free"), ("data.validation", "free"),
        ("batch.sequences", "accept"), ("batch.microbatch", "free"), ("optim.muon.lr", "accept"),
        ("optim.schedule.final", "accept"), ("balancing.kind", "accept"), ("loss.z", "accept"),
        ("parallel.shard", "free"), ("kernels.attention", "free"), ("kernels.experts", "free"),
        ("precision.compute", "accept"), ("precision.fp8", "accept"), ("recompute", "free"),
        ("checkpoint.every", "free"), ("checkpoint.url", "free"), ("log.wandb", "free"), ("health.bad_steps", "free"),
    ],
)  # fmt: skip
def test_the_longest_prefix_decides(key: str, rule: str) -> None:
    assert rule_of(key) == rule


def test_free_changes_are_listed() -> None:
    before, now = RunConfig(), RunConfig()
    assert check_changes(before, now, 0, [], "runs/mine") == []
    now.run.steps, now.recompute, now.batch.microbatch, now.log.wandb = 5, "block", 2, "project"
    assert check_changes(before, now, 0, [], "runs/mine") == ["run.steps", "batch.microbatch", "recompute", "log.wandb"]


def test_fixed_changes_are_refused_even_when_accepted() -> None:
    """All fixed keys are named, with both values."""
    before, now = RunConfig(), RunConfig(model=ZOO["nano"])
    now.run.seed = 3
    sentence = refusal(before, now, ["run.seed", "model"])
    assert sentence.startswith(
        "runs/mine holds a run with another config (run.seed was 0 and is 3, model.name was smoke"
    )
    assert "model.width was 256 and is 1024" in sentence
    assert sentence.endswith("restore the old value, or start a new run in another run.dir")


def test_adding_a_source_without_weights_is_refused() -> None:
    """Without data.mixture all sources have equal weights, so a new source changes the weights of the others."""
    before, now = RunConfig(), RunConfig()
    before.data.train, now.data.train = {"b": "y"}, {"a": "x", "b": "y"}
    sentence = refusal(before, now, [])
    assert sentence.startswith(
        "data phase 0 of runs/mine has begun and must not change (mixture was {'b': 1.0} and is {'a': 0.5, 'b': 0.5})"
    )
    now.data.mixture = {"b": 3, "a": 0}
    assert check_changes(before, now, 0, [], "runs/mine") == ["data.train", "data.mixture"]


def test_phases_that_have_begun_are_fixed_and_later_ones_free() -> None:
    def config(*phases: DataPhaseConfig) -> RunConfig:
        changed = RunConfig()
        changed.data.train, changed.data.mixture, changed.data.phases = (
            {"a": "x", "b": "y"},
            {"a": 1, "b": 1},
            list(phases),
        )
        return changed

    before = config(DataPhaseConfig(1000, {"a": 1}), DataPhaseConfig(2000, packing="rsdb"))
    now = config(DataPhaseConfig(1000, {"a": 1}), DataPhaseConfig(1500, {"b": 1}))
    assert check_changes(before, now, 1499, [], "runs/mine") == ["data.phases"]
    assert "data phase 2 of runs/mine has begun and must not change (it was added)" in refusal(
        before, now, [], tokens_read=1500
    )
    sentence = refusal(
        before, config(DataPhaseConfig(1000, {"b": 1}), DataPhaseConfig(2000, packing="rsdb")), [], tokens_read=1000
    )
    assert (
        "data phase 1 of runs/mine has begun and must not change (mixture was {'a': 1.0} and is {'b': 1.0})" in sentence
    )
    assert sentence.endswith("let changes begin after 1000 tokens")
    assert "data phase 1 of runs/mine has begun and must not change (it was removed)" in refusal(
        before, config(), [], tokens_read=1000
    )
    assert check_changes(before, config(), 999, [], "runs/mine") == ["data.phases"]


def test_each_learning_change_needs_accept_change() -> None:
    before, now = RunConfig(), RunConfig()
    now.optim.muon.lr, now.loss.z, now.batch.ramp = 2e-3, 1e-6, [RampEntryConfig(5, 8)]
    changed = ["batch.ramp", "optim.muon.lr", "loss.z"]
    sentence = refusal(before, now, [])
    assert "resuming runs/mine would change how the model learns (batch.ramp was [] and is [{'tokens': 5" in sentence
    assert "optim.muon.lr was 0.001 and is 0.002" in sentence
    words = "--accept-change batch.ramp --accept-change optim.muon.lr --accept-change loss.z"
    assert sentence.endswith(f"add {words} to accept it")
    assert refusal(before, now, ["loss.z", "batch"]).endswith("add --accept-change optim.muon.lr to accept it")
    assert check_changes(before, now, 0, changed, "runs/mine") == changed
    assert check_changes(before, now, 0, ["optim", "batch", "loss"], "runs/mine") == changed


def test_accept_change_matches_whole_keys() -> None:
    """optim.muon.l does not accept optim.muon.lr."""
    before, now = RunConfig(), RunConfig()
    now.optim.muon.lr = 2e-3
    assert "optim.muon.lr" in refusal(before, now, ["optim.muon.l", "optim.mu"])


def test_relative_and_absolute_paths_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a file, a pattern and a folder, relative to the working directory; from another directory they differ."""
    before, now = RunConfig(), RunConfig()
    for config, start in ((before, f"{tmp_path}/"), (now, "")):
        config.run.dir, config.init.hf, config.checkpoint.url = f"{start}run", f"{start}hf", "s3://bucket/run"
        config.data.train, config.data.validation = {"a": f"{start}a/*.txt"}, {"b": f"{start}b"}
    monkeypatch.chdir(tmp_path)
    assert check_changes(before, now, 0, [], "runs/mine") == []
    monkeypatch.chdir("/")
    assert check_changes(before, now, 0, [], "runs/mine") == ["run.dir", "init.hf", "data.train", "data.validation"]
