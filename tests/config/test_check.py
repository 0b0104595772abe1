"""Values that do not fit together are refused, with the value and what to write instead."""

import math
import re
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from trinity.config import RunConfig, load_config, run_directory
from trinity.config.check import check_run
from trinity.config.run import RunSection
from trinity.errors import UserError

Write = Callable[[str], Path]

AT_LEAST = {
    "data.sequence_length": 1,
    "data.streams": 1,
    "batch.sequences": 1,
    "batch.microbatch": 1,
    "optim.muon.lr": 0,
    "optim.muon.steps": 1,
    "optim.muon.weight_decay": 0,
    "optim.adamw.lr": 0,
    "optim.adamw.weight_decay": 0,
    "optim.clip_norm": 0,
    "optim.schedule.warmup_steps": 0,
    "optim.schedule.final": 0,
    "balancing.sequence_loss": 0,
    "loss.z": 0,
    "run.steps": 0,
    "run.threads": 1,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "export.every": 0,
    "evaluation.every": 0,
    "evaluation.sequences": 1,
    "log.every": 1,
    "log.het_sequences": 1,
    "health.bad_steps": 1,
}


def config_with(key: str, value: Any) -> RunConfig:
    """A run of one step with one changed value."""
    config = RunConfig(run=RunSection(steps=1))
    *sections, name = key.split(".")
    setattr(reduce(getattr, sections, config), name, value)
    return config


def refusal(path: Path, words: list[str]) -> str:
    """The refusal of these overrides."""
    with pytest.raises(UserError) as caught:
        load_config(path, words)
    return str(caught.value)


def test_smallest_values() -> None:
    """The bound is allowed, one less is not."""
    for key, least in AT_LEAST.items():
        check_run(config_with(key, least))
        with pytest.raises(UserError) as caught:
            check_run(config_with(key, least - 1))
        assert str(caught.value) == f"{key}={least - 1} must be at least {least}"


@pytest.mark.parametrize("key", ["loss.z", "optim.muon.lr", "optim.clip_norm"])
def test_nan_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"^{key}=nan must be at least 0$"):
        check_run(config_with(key, math.nan))


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_momenta_and_betas(value: float) -> None:
    """At least 0 and less than 1."""
    momenta = {"optim.muon.momentum": value, "balancing.beta": value}
    for key, new in momenta.items():
        with pytest.raises(UserError, match=f"^{key}={value} must be at least 0 and less than 1$"):
            check_run(config_with(key, new))
    for place, betas in enumerate([(value, 0.5), (0.5, value)]):
        sentence = f"optim.adamw.betas[{place}]={value} must be at least 0 and less than 1"
        with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
            check_run(config_with("optim.adamw.betas", betas))


COMBINATIONS = [
    ([], "the length of the run is run.steps or run.tokens, and neither is given; set exactly one"),
    (["run.steps=1", "run.tokens=5"], "the length of the run is run.steps or run.tokens, and both are given"),
    (["run.tokens=0"], "run.tokens=0 must be at least 1"),
    (["run.steps=1", "batch.ramp=[{tokens: 0, sequences: 4}]"], "batch.ramp has {tokens: 0, sequences: 4} after 0"),
    (["run.steps=1", "batch.ramp=[{tokens: 5, sequences: 0}]"], "batch.ramp has {tokens: 5, sequences: 0} after 0"),
    (
        ["run.steps=1", "batch.ramp=[{tokens: 9, sequences: 4}, {tokens: 9, sequences: 8}]"],
        "batch.ramp has {tokens: 9, sequences: 8} after 9 tokens; each entry must begin later",
    ),
    (
        ["run.steps=9", "optim.schedule.decay=linear"],
        "optim.schedule.decay=linear has no start; set decay_start_tokens or decay_start_steps",
    ),
    (
        ["run.steps=9", "optim.schedule.decay_start_steps=1", "optim.schedule.decay_start_tokens=5"],
        "optim.schedule.decay_start_tokens and .decay_start_steps are both given; keep one",
    ),
    (
        ["run.steps=9", "optim.schedule.decay_steps=1", "optim.schedule.decay_tokens=5"],
        "optim.schedule.decay_tokens and .decay_steps are both given; keep one",
    ),
    (
        ["run.steps=9", "optim.schedule.decay_start_steps=1", "optim.schedule.decay_tokens=5"],
        "optim.schedule mixes decay in tokens with decay in steps; write both in one unit",
    ),
    (
        ["run.steps=9", "optim.schedule.decay=linear", "optim.schedule.decay_start_tokens=5"],
        "optim.schedule gives no length of decay and the run's length is in another unit; set decay_tokens or",
    ),
    (["run.steps=1", "data.mixture.a=1"], "data.mixture names a, which data.train does not (known: [])"),
    (
        ["run.steps=1", "data.train.a=x", "data.mixture.a=-1"],
        "data.mixture={'a': -1.0} must hold weights of at least 0",
    ),
    (
        ["run.steps=1", "data.train.a=x", "data.train.b=x", "data.mixture.a=1"],
        "data.mixture gives b no weight; add one, 0 to leave it out",
    ),
    (
        ["run.steps=1", "data.phases=[{tokens: 7}, {tokens: 7}]"],
        "data.phases[1].tokens=7 does not come after 7; a phase must begin later",
    ),
    (["run.steps=1", "data.phases=[{tokens: 0}]"], "data.phases[0].tokens=0 does not come after 0"),
    (
        ["run.steps=1", "data.train.a=x", "data.phases=[{tokens: 7, mixture: {b: 1}}]"],
        "data.phases[0].mixture names b, which data.train does not (known: ['a']); write mixture: {a: 1}",
    ),
    (
        ["run.steps=1", "data.phases=[{tokens: 7, length_bias: {floor: 0}}]"],
        "data.phases[0].length_bias has tokens=131072, floor=0.0, ceiling=1.0; tokens must be at least 1, and 0",
    ),
    (["run.steps=1", "data.phases=[{tokens: 7, rsdb_size: 0}]"], "data.phases[0].rsdb_size=0 must be at least 1"),
    (["run.steps=1", "data.rsdb_size=0"], "data.rsdb_size=0 must be at least 1"),
    (["run.steps=1", "data.train.a=x", "data.mixture.a=0"], "data.mixture={'a': 0.0} must hold weights of at least 0"),
    (["run.steps=1", "init.hf=a", "init.run=b"], "init.hf and init.run are both given; keep the one the run should"),
    (
        ["run.steps=1", "precision.compute=float64"],
        "precision.compute=float64 with optim.muon.dtype=bfloat16 is not a float64 run; use optim.muon.dtype=float64",
    ),
    (
        ["run.steps=1", "precision.compute=float32", "precision.fp8=torchao"],
        "precision.fp8=torchao rounds bfloat16 to 8 bits and precision.compute=float32; use precision.compute=bfloat16",
    ),
    (
        ["run.steps=1", "compile=block", "recompute=selective"],
        "compile=block with recompute=selective would compile nothing, because compiled code cannot say what recompute "
        "keeps; use compile=none or recompute=none",
    ),
]


@pytest.mark.parametrize(("words", "sentence"), COMBINATIONS)
def test_refused_combinations(write: Write, words: list[str], sentence: str) -> None:
    assert refusal(write("{}"), words).startswith(sentence)


@pytest.mark.parametrize(
    "words",
    [
        ["run.steps=0"],
        ["run.steps=9", "optim.schedule.decay=linear", "optim.schedule.decay_start_steps=5"],
        ["run.tokens=9", "optim.schedule.decay=cosine", "optim.schedule.decay_start_tokens=5"],
        [
            "run.steps=9", "optim.schedule.decay=linear", "optim.schedule.decay_start_tokens=5",
            "optim.schedule.decay_tokens=5",
        ],
        ["run.steps=1", "data.train.a=x", "data.train.b=y", "data.mixture.a=1", "data.mixture.b=0"],
        [
            "run.steps=1", "data.train.a=x", "data.train.b=y", "data.mixture.a=1",
            "data.phases=[{tokens: 5, mixture: {a: 1, b: 2}, packing: rsdb, length_bias: {floor: 0.01, ceiling: 0.9}}]",
        ],
        ["run.steps=1", "precision.compute=float64", "optim.muon.dtype=float64"],
        ["run.steps=1", "batch.ramp=[{tokens: 5, sequences: 4}, {tokens: 6, sequences: 2}]"],
    ],
)  # fmt: skip
def test_accepted_combinations(write: Write, words: list[str]) -> None:
    """Values next to the refused ones above."""
    load_config(write("{}"), words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model.heads=7"], "model.heads=7 is not a multiple of model.kv_heads=2; use model.kv_heads=1 or 7"),
        (
            ["model.active_experts=17"],
            "model.active_experts=17 is more than model.experts=16; use model.active_experts=16 or less",
        ),
        (["model.dense_layers=6"], "model.dense_layers=6 is not between 0 and model.layers=5"),
        (["model.dense_layers=-1"], "model.dense_layers=-1 is not between 0 and model.layers=5"),
        (["model.head_dim=63"], "model.head_dim=63 is odd; RoPE turns pairs, so use model.head_dim=64"),
        (["model.width=0"], "model.width=0 must be at least 1"),
        (["model.window=0"], "model.window=0 must be at least 1"),
        (["model.norm_eps=0"], "model.norm_eps=0.0 must be greater than 0"),
        (["model.rope_theta=-1"], "model.rope_theta=-1.0 must be greater than 0"),
    ],
)
def test_refused_models(write: Write, words: list[str], sentence: str) -> None:
    assert refusal(write("run: {steps: 1}"), words) == sentence


def test_run_directory(write: Write) -> None:
    path = write("run: {steps: 1, name: mine}")
    assert run_directory(load_config(path)) == Path("runs/mine")
    assert run_directory(load_config(path, ["run.dir=/elsewhere"])) == Path("/elsewhere")


def test_infinity_is_refused(write: Callable[[str], Path]) -> None:
    """Infinity is above every lower bound, and still refused."""
    with pytest.raises(UserError, match=r"^loss\.z=inf must be finite$"):
        load_config(write("run: {steps: 1}\nloss: {z: .inf}\n"))
