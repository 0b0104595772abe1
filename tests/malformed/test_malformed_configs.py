"""Malformed configs: a wrong value for every setting, files and overrides that hold no settings."""

import dataclasses
import math
import random
import typing
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from tests.malformed.refusals import REFUSED_START, refusal, train
from trinity.config import RunConfig, load_config

SMOKE = Path(__file__).parents[2] / "configs/smoke.yaml"


def settings_of(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and type of every setting."""
    types = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        key, kind = f"{prefix}{field.name}", types[field.name]
        if dataclasses.is_dataclass(kind):
            yield from settings_of(kind, f"{key}.")
        else:
            yield key, kind


SETTINGS = dict(settings_of(RunConfig))
LIST, MAP = [1, [2]], {"a": [1]}
WRONG = {
    int: [LIST, math.nan, 1 << 63],
    float: [MAP, math.inf, 10**400],
    bool: [LIST, 1.5],
    str: [MAP, "a\0b"],
    Literal: [LIST, "word"],
    dict: [LIST, 5, {"a": {"b": 1}}],
    list: [MAP, 5, [[1]], [None], [{"zz": 1}]],
    tuple: [MAP, "word", [], [0.9], ["word", 0.5], [[1], 0.5], [0.9, 1], [-0.1, 0.5], [math.nan, 0.5], [0.5, None]],
    Any: [MAP, "word", 0, -1, 1.5, True, [[1]], "3-1", "1-2-3", "1-9999", "9" * 5000, 4],
}
"""Type → values that no setting of that type may have. The run has three steps, so profile.steps=4 is beyond it."""
ALSO_WRONG = {
    int: [MAP, "word", "", -1.5, math.inf, True, -(1 << 63)],
    float: [LIST, "word", "", math.nan, -math.inf, True],
    bool: [MAP, "word", "", math.nan],
    str: [LIST, [None]],
    Literal: [MAP, 1.5, 1 << 63, ""],
    dict: ["word", True, [{"a": "b"}]],
    list: ["word", True, 1.5],
    tuple: [5, LIST, None, [1, 2, 3]],
    Any: ["-1", "1.5", [0], {"1": 2}, "1-", "-"],
}
"""More of them, for the long test."""
BELOW = [key for key, kind in SETTINGS.items() if key != "run.seed" and not key.startswith("parallel.")]
"""Number settings that must not be -2. Mesh sizes are checked later, against the number of processes."""


def kind_of(kind: Any) -> tuple[type, bool]:
    """(the key in WRONG for this type, whether None is allowed)."""
    parts = typing.get_args(kind)
    if type(None) in parts:
        return kind_of(parts[0])[0], True
    return typing.get_origin(kind) or kind, kind is Any


def nested(key: str, value: Any) -> dict:
    """A config of a run of 3 steps in which `key` has this value."""
    content = reduce(lambda inner, part: {part: inner}, reversed(key.split(".")), value)
    content["run"] = {"steps": 3} | content.get("run", {})
    return content


def refused(tmp_path: Path, content: str | bytes | dict, words: list[str] | None = None) -> str:
    """The error message for a config file with this content."""
    path = tmp_path / "run.yaml"
    text = yaml.safe_dump(content) if isinstance(content, dict) else content
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return refusal(lambda: load_config(path, words), tmp_path)


def check_values(tmp_path: Path, key: str, values: list) -> None:
    """Check that each value is refused with a message that names the setting."""
    for value in values:
        sentence = refused(tmp_path, nested(key, value))
        # one message covers the relation between the three values of a length bias
        assert key in sentence or sentence.startswith("data.length_bias has tokens="), value


@pytest.mark.parametrize("key", SETTINGS)
def test_a_wrong_value(tmp_path: Path, key: str) -> None:
    """A list, another type, NaN, more than 64 bits, null, a negative number: each names the setting."""
    kind, optional = kind_of(SETTINGS[key])
    none = [] if optional else [None]
    negative = [-2] if kind in (int, float) and key in BELOW else []
    check_values(tmp_path, key, [*WRONG[kind], *none, *negative])


@pytest.mark.slow
@pytest.mark.parametrize("key", SETTINGS)
def test_more_wrong_values(tmp_path: Path, key: str) -> None:
    switch = key in ("optim.muon.share", "parallel.defer_reduce")  # YAML reads on and off as booleans
    check_values(tmp_path, key, [v for v in ALSO_WRONG[kind_of(SETTINGS[key])[0]] if not (switch and v is True)])


ZERO = [
    "run.tokens", "run.threads", "init.step", "model.vocab_size", "model.width", "model.layers", "model.dense_width",
    "model.heads", "model.kv_heads", "model.head_dim", "model.window", "model.global_every", "model.experts",
    "model.active_experts", "model.shared_experts", "model.expert_width", "model.route_scale", "model.rope_theta",
    "model.norm_eps", "model.max_positions", "data.sequence_length", "data.rsdb_size", "data.streams",
    "data.length_bias.tokens", "data.length_bias.floor", "data.length_bias.ceiling", "batch.sequences",
    "batch.microbatch", "optim.muon.steps", "checkpoint.keep", "evaluation.sequences", "evaluation.sample_tokens",
    "log.every", "log.het_sequences", "health.bad_steps", "health.spike.sigma", "health.spike.window",
]  # fmt: skip
ENORMOUS = [
    "run.threads", "model.vocab_size", "model.width", "model.layers", "model.dense_layers", "model.dense_width",
    "model.heads", "model.kv_heads", "model.head_dim", "model.experts", "model.active_experts", "model.shared_experts",
    "model.expert_width", "data.sequence_length", "data.rsdb_size", "data.streams", "data.workers", "batch.sequences",
    "batch.microbatch", "optim.muon.steps", "evaluation.sample_tokens", "health.heartbeat_seconds",
    "health.spike.window",
]  # fmt: skip


def test_zero_is_refused(tmp_path: Path) -> None:
    for key in ZERO:
        assert key.removeprefix("data.length_bias.") in refused(tmp_path, nested(key, 0)), key


def test_enormous_numbers(tmp_path: Path, limited_memory: None) -> None:
    """10¹⁸ is refused at once for every setting that determines a size or a count; nothing that large is allocated."""
    for key in ENORMOUS:
        assert key.rpartition(".")[2] in refused(tmp_path, nested(key, 10**18)), key
    sentence = refused(tmp_path, nested("model.heads", 10**18 + 1))  # which takes long to divide
    assert sentence == f"model.heads={10**18 + 1} must be at most 65536"


@pytest.mark.parametrize("section", ["", *sorted({key.rpartition(".")[0] for key in SETTINGS if "." in key})])
def test_an_unknown_key(tmp_path: Path, section: str) -> None:
    """At every level, in a file and on the command line: no key is similar, so the message lists the existing ones."""
    key = f"{section}.zzz" if section else "zzz"
    sentence = refused(tmp_path, nested(key, 1))
    assert sentence.startswith(f"{key} in {tmp_path / 'run.yaml'} is not a known key; ")
    keys = [name for name in SETTINGS if name.startswith(f"{section}." if section else "")]
    names = dict.fromkeys(name.removeprefix(f"{section}.").split(".")[0] for name in keys)
    assert sentence.endswith(f"{section} has {', '.join(names)}" if section else f"one of {', '.join(names)}")
    assert f"{key} in the command line is not a known key" in refused(tmp_path, "run: {steps: 3}", [f"{key}=1"])


FILES = {
    "": "run.steps or run.tokens", "\n": "run.steps or run.tokens", "null": "run.steps or run.tokens",
    "word": "word in FILE is not a known key", "5": "FILE holds no settings", "1.5": "FILE holds no settings",
    "true": "FILE holds no settings", "[]": "FILE holds no settings", "- a": "FILE holds no settings",
    "\t": "FILE is not valid YAML", "run:\n\tsteps: 1": "FILE is not valid YAML",
    "run: {steps: 1": "FILE is not valid YAML", "run: &a {x: *a}": "FILE is not valid YAML",
    "run: &a\n  steps: *a": "FILE is not valid YAML", "a: &a [*a]": "FILE is not valid YAML",
    "run: {steps: 1}\n---\nrun: {steps: 2}": "FILE is not valid YAML", "run: !!python/object:os.system 1": "FILE is no",
    "run: !foo 1": "FILE is not valid YAML", "? [a]\n: 1": "unhashable key", "1: 2": "1 in FILE is not a known key",
    "true: 1": "true in FILE is not a known key", "null: 1": "FILE is not valid YAML", "1.5: 2": "1.5 in FILE is not a",
    "run.steps.x: 1": "run.steps.x in FILE is not a known key", "a.b.c: 1": "a.b.c in FILE is not a known key",
    "run: {steps: !!int abc}": "FILE is not valid YAML", "run: {steps: !!binary abc=}": "run.steps in FILE",
    "run: {steps: 2020-01-01}": "run.steps in FILE", "run: {steps: .inf}": "run.steps in FILE",
    f"run: {{steps: {'9' * 5000}}}": "FILE is not valid YAML", "[" * 3000: "FILE is not valid YAML",
    "run: {steps: 1, name: '${run.steps'}": "FILE is not valid YAML", "run: '${model}'": "run in FILE",
    "run: {steps: 1, name: '${run.name}'}": "run.name in FILE", "run: {steps: 1, name: '${oc.env:NO_SUCH}'}": "run.",
    "run: {steps: 1, name: '${foo:bar}'}": "run.name in FILE", "run: {steps: '???'}": "run.steps or run.tokens",
    "run: {steps: 1}\nbatch: '${data}'": "batch in FILE", "run: {<<: 5, steps: 1}": "FILE is not valid YAML",
    "run: {steps: 1, steps: 2}": "duplicate key steps", "run: {steps: 1}\nrun: {seed: 1}": "duplicate key run",
    b"\x00": "FILE is not valid YAML", b"\xff\xfe\x00": "FILE is not UTF-8 text", b"\x80": "FILE is not UTF-8 text",
    b"run: {steps: 1}\x00": "FILE is not valid YAML", b"\x7fELF\x02\x01": "FILE is not valid YAML",
}  # fmt: skip


@pytest.mark.parametrize("content", FILES, ids=range(len(FILES)))
def test_a_file_that_is_no_config(tmp_path: Path, content: str | bytes) -> None:
    expected = FILES[content].replace("FILE", str(tmp_path / "run.yaml"))
    assert expected in refused(tmp_path, content)


OVERRIDES = {
    "a.b": "a.b is not a setting", "=3": "=3 is not a setting", "run..steps=1": "run..steps=1 is not a setting",
    ".run=1": ".run=1 is not a setting", "run.=1": "run.=1 is not a setting", "data.train.=x": "data.train.=x is not a",
    "run.steps=": "run.steps or run.tokens", "run=1": "run in the command line", "model=nano": "model in the command",
    "run.steps.x=1": "run.steps.x in the command line", "run.steps[0]=1": "run.steps[0]=1 is not a setting",
    "run[steps]=1": "run[steps]=1 is not a setting", "batch.ramp[0].tokens=5": "batch.ramp[0].tokens=5 is not a",
    "batch.ramp.0.tokens=1": "batch.ramp.0", "optim.adamw.betas.0=2": "optim.adamw.betas.0 in the command line",
    "run.steps=[": "the command line is not valid", "run.steps={": "the command line is not valid",
    "run.steps=${x}": "run.steps", "run.steps==3": "run.steps in the command line", "run.steps=1=2": "run.steps in the",
    "run .steps=1": "run  in the command line is not a known key", "data.train={a}": "data.train.a in the command line",
    "data.train=[a]": "data.train in the command line", "data.train=a": "data.train in the command line",
    "data.train={a: x": "the command line is not valid", "data.train.a=": "data.train.a in the command line",
    "model.name=": "model.name in the command line", "model.name=5": "model.name=5 is not known",
    "--x=3": "--x in the command line", "run.steps=\x00": "the command line is not valid", "run.steps=nan": "run.steps",
    "run.steps=!!python/name:os.system": "the command line is not valid", "run.steps=1.5": "run.steps in the command",
    "{run: {steps: 1}}": "{run: {steps: 1}} is not a setting", "[]=1": "[]=1 is not a setting", "''=1": "'' in the com",
    "run.steps=!!int abc": "the command line is not valid", f"run.steps={'9' * 5000}": "the command line is not valid",
    "run.name=": "run.name in the command line", "run.name=..": "run.name='..' names no folder",
    "run.name=./": "run.name='./' names no folder", "run.name=a\nb\0c": "run.name in the command line holds",
}  # fmt: skip


@pytest.mark.parametrize("word", OVERRIDES, ids=range(len(OVERRIDES)))
def test_an_override_that_is_no_setting(tmp_path: Path, word: str) -> None:
    assert OVERRIDES[word] in refused(tmp_path, "run: {steps: 1}", [word])


MAPS_AND_LISTS = {
    "data: {train: {a: ''}}": "data.train has 'a': ''", "data: {train: {'': x}}": "data.train has '': 'x'",
    "data: {train: {a: null}}": "data.train.a",
    "data: {validation: {a: ''}}": "data.validation has 'a': ''",
    "data: {train: {a: x}, mixture: {a: .nan}}": "data.mixture",
    "data: {train: {a: x}, mixture: {a: .inf}}": "data.mix",
    "data: {train: {a: x}, mixture: {a: null}}": "data.mixture.a", "data: {train: {a: x}, mixture: {a: w}}": "mixture",
    "data: {train: {a: x, b: y}, mixture: {a: 1.5e308, b: 1.5e308}}": "data.mixture",
    "data: {phases: [{}]}": "data.phases[0].tokens", "data: {phases: [{tokens: -5}]}": "data.phases[0].tokens=-5",
    "data: {phases: [{tokens: .nan}]}": "tokens", "data: {phases: [{tokens: 5, packing: word}]}": "packing",
    "data: {phases: [{tokens: 5, rsdb_size: 1000000000}]}": "data.phases[0].rsdb_size=1000000000 must be at most",
    "data: {phases: [{tokens: 5, sequence_length: -1}]}": "data.phases[0].sequence_length=-1 must be at least 1",
    "data: {phases: [{tokens: 5, length_bias: 5}]}": "data.phases", "data: {phases: [{tokens: 9}, {tokens: 5}]}": "[1]",
    "data: {phases: [{tokens: 5, length_bias: {floor: .nan}}]}": "data.phases[0].length_bias",
    "data: {train: {a: x}, phases: [{tokens: 5, mixture: {a: [1]}}]}": "data.phases[0].mixture.a=[1] is a list",
    "data: {train: {a: x}, phases: [{tokens: 5, mixture: {a: -1}}]}": "data.phases[0].mixture",
    "batch: {ramp: [{tokens: 9, sequences: 1000000000}]}": "sequences: 1000000000",
    "batch: {ramp: [{tokens: 9, sequences: -1}]}": "sequences: -1", "batch: {ramp: [{}]}": "batch.ramp[0].tokens",
    "batch: {ramp: [{tokens: null, sequences: 1}]}": "tokens", "batch: {ramp: [null]}": "batch.ramp[0]",
    "data: {tokenizer: x}\nevaluation: {prompts: [[a]]}": "evaluation.prompts[0]=['a'] is a list",
    "data: {tokenizer: x}\nevaluation: {prompts: [{a: 1}]}": "evaluation.prompts[0]={'a': 1} is a dict",
    "profile: {ranks: [-1]}": "profile.ranks=[-1]", "profile: {ranks: [word]}": "profile.ranks[0]",
    "model: {heads: 3}": "model.heads=3", "model: {kv_heads: 5}": "model.kv_heads=5",
    "model: {name: [nano]}": "model.name=['nano']", "init: {hf: a, run: b}": "init.hf and init.run",
}  # fmt: skip


@pytest.mark.parametrize("content", MAPS_AND_LISTS, ids=range(len(MAPS_AND_LISTS)))
def test_values_in_maps_and_lists(tmp_path: Path, content: str) -> None:
    assert MAPS_AND_LISTS[content] in refused(tmp_path, f"run: {{steps: 3}}\n{content}")


def damaged_config(seed: int) -> bytes:
    """configs/smoke.yaml with some bytes removed, duplicated or replaced by YAML's special characters."""
    rng, content = random.Random(seed), bytearray(SMOKE.read_bytes())
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(len(content)), rng.randint(0, 8)
        piece = rng.choice(
            [b"", bytes(content[place : place + 9]), *b"{ } [ ] : , & * ! | > - ? # \" ' % @ \t".split()]
        )
        content[place : place + length] = piece
    return bytes(content)


def count_refusals(tmp_path: Path, seeds: range) -> int:
    """Number of damaged files that are refused, each with one sentence; the others load."""
    path, count = tmp_path / "run.yaml", 0
    for seed in seeds:
        path.write_bytes(damaged_config(seed))
        try:
            load_config(path)
        except Exception:
            assert refusal(lambda: load_config(path), tmp_path), seed
            count += 1
    return count


def test_damaged_files(tmp_path: Path) -> None:
    """No damaged file causes a traceback, and at least a third are refused, so that the test is meaningful."""
    assert count_refusals(tmp_path, range(30)) > 10


@pytest.mark.slow
def test_many_damaged_files(tmp_path: Path) -> None:
    assert count_refusals(tmp_path, range(1000, 3000)) > 700


IN_A_RUN = {
    "parallel.replicate=0": "parallel.replicate=0", "parallel.replicate=-2": "parallel.replicate=-2",
    "parallel.shard=0": "parallel.shard=0", "parallel.expert=0": "parallel.expert=0",
    "parallel.expert=-1": "parallel.expert=-1", "parallel.context=0": "parallel.context=0",
    "parallel.context=2": "use parallel.context=1,", "parallel.replicate=-1": "parallel.replicate and parallel.shard",
    f"parallel.replicate={10**18}": "parallel.replicate=1000000000000000000", "data.train={}": "data.train",
    "data.train.code=nowhere": "nowhere", "data.validation.held_out=nowhere": "nowhere",
    "data.train.code=/dev/null/x": "/dev/null/x", "data.tokenizer=nowhere": "nowhere", "init.hf=nowhere": "nowhere",
    "init.run=nowhere": "nowhere",
    "model.vocab_size=8": "model.vocab_size=8", "kernels.experts=megablocks": "kernels.ex",
    f"data.train.code={'x' * 300}": "xxx",
}  # fmt: skip


@pytest.mark.parametrize("word", IN_A_RUN, ids=range(len(IN_A_RUN)))
def test_values_that_only_a_run_can_check(settings: dict, word: str, tmp_path: Path) -> None:
    """Sources, tokenizers and meshes, checked by starting the run: it writes only its lock and status.json."""
    settings["data"]["workers"] = 0
    settings["init"] = {}
    if word == "data.train={}":
        settings["data"] |= {"train": {}, "mixture": {}, "phases": []}
    run = Path(settings["run"]["dir"])
    run.mkdir()
    sentence = refusal(lambda: train(settings, word), run, may_change=REFUSED_START)
    assert IN_A_RUN[word] in sentence
