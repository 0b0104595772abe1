"""Load a YAML file and overrides into a RunConfig; every mistake becomes one sentence."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from trinity.config import ZOO, RunConfig, load_config, save_config
from trinity.config.load import flatten
from trinity.config.run import RampEntryConfig
from trinity.errors import UserError

Write = Callable[[str], Path]


def refusal(path: Path, words: list[str] | None = None) -> str:
    """The refusal of a config."""
    with pytest.raises(UserError) as caught:
        load_config(path, words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_changes_only_its_keys(write: Write) -> None:
    """All other keys keep their defaults, nested sections too."""
    config = load_config(write("run: {steps: 7}\noptim: {muon: {momentum: 0.9}}\n"))
    expected = RunConfig()
    expected.run.steps = 7
    expected.optim.muon.momentum = 0.9
    assert config == expected


def test_model_name_sets_the_sizes(write: Write) -> None:
    """In the file or on the command line; fields that are given then replace them."""
    path = write("run: {steps: 1}\nmodel: {name: nano, layers: 8}\n")
    assert load_config(path).model == replace(ZOO["nano"], layers=8)
    assert load_config(path, ["model.name=large"]).model == replace(ZOO["large"], layers=8)
    assert load_config(write("run: {steps: 1}\n")).model == ZOO["smoke"]


def test_overrides_win_over_the_file(write: Write) -> None:
    path = write("run: {steps: 7, name: mine}\ndata: {train: {a: x, b: y}}\n")
    words = ["run.steps=9", "optim.muon.lr=1e-4", "data.train.b=z", "batch.ramp=[{tokens: 5, sequences: 8}]"]
    config = load_config(path, words)
    assert (config.run.steps, config.run.name) == (9, "mine")
    assert config.optim.muon.lr == 1e-4
    assert config.data.train == {"a": "x", "b": "z"}
    assert config.batch.ramp == [RampEntryConfig(tokens=5, sequences=8)]
    assert load_config(path, ["run.steps=null", "run.tokens=100"]).run.tokens == 100


@pytest.mark.parametrize(("text", "tokens"), [("17e12", 17 * 10**12), ("4.9e12", 49 * 10**11), ("1000", 1000)])
def test_token_counts_are_whole_numbers(write: Write, text: str, tokens: int) -> None:
    """17e12 is a float in YAML; here it becomes the exact integer, in files and overrides."""
    for config in (
        load_config(write(f"run: {{tokens: {text}}}\nbatch: {{ramp: [{{tokens: {text}, sequences: 8}}]}}\n")),
        load_config(write("{}"), [f"run.tokens={text}", f"batch.ramp=[{{tokens: {text}, sequences: 8}}]"]),
    ):
        assert config.run.tokens == config.batch.ramp[0].tokens == tokens
        assert type(config.run.tokens) is type(config.batch.ramp[0].tokens) is int


def test_an_integer_for_a_float_field(write: Write) -> None:
    config = load_config(write("run: {steps: 1}\nbalancing: {kappa: 3}\n"))
    assert config.balancing.kappa == 3.0
    assert type(config.balancing.kappa) is float


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("rum: {steps: 1}", "rum", "run"),
        ("run: {stepz: 1}", "run.stepz", "run.steps"),
        ("optim: {muon: {momentun: 0.9}}", "optim.muon.momentun", "optim.muon.momentum"),
        ("optim: {schedule: {warmup: 5}}", "optim.schedule.warmup", "optim.schedule.warmup_steps"),
        ("model: {name: nano, n_layers: 5}", "model.n_layers", "model.layers"),
    ],
)
def test_an_unknown_key_names_the_nearest(write: Write, text: str, key: str, nearest: str) -> None:
    path = write(text)
    assert refusal(path) == f"{key} in {path} is not a known key; did you mean {nearest}?"


def test_an_unknown_override_names_the_command_line(write: Write) -> None:
    sentence = refusal(write("run: {steps: 1}"), ["run.sede=3"])
    assert sentence == "run.sede in the command line is not a known key; did you mean run.seed?"


def test_an_unknown_key_in_a_list(write: Write) -> None:
    path = write("run: {steps: 1}\nbatch: {ramp: [{tokens: 5, sequence: 3}]}")
    assert f"batch.ramp in {path}: not a known key. Did you mean: 'sequences'?" in refusal(path)


@pytest.mark.parametrize(
    ("text", "nested"),
    [("run.steps: 5", "run: {steps: …}"), ("optim: {muon.lr: 1}", "optim: {muon: {lr: …}}")],
)
def test_dots_in_a_file_are_explained(write: Write, text: str, nested: str) -> None:
    """Dots nest only on the command line."""
    assert refusal(write(text)).endswith(f"is written with dots; in a file write {nested}")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("run: {steps: many}", "run.steps in {path}: 'many' is not a whole number; write one"),
        ("run: {tokens: 1.5}", "run.tokens in {path}: '1.5' is not a whole number; write one"),
        ("run: {steps: true}", "run.steps in {path}: 'True' is not a whole number; write one"),
        ("optim: {muon: {lr: fast}}", "optim.muon.lr in {path}: 'fast' is not a number; write one"),
        (
            "recompute: blok",
            "recompute in {path}: Invalid value 'blok', expected one of ['none', 'block', ",
        ),
        ("balancing: {kind: smbu}", "balancing.kind in {path}: Invalid value 'smbu', expected one of ['smebu', 'sign"),
        (
            "optim: {adamw: {betas: [0.9]}}",
            "optim.adamw.betas in {path}: needs 2 values, not 1",
        ),
        ("batch: 5", "batch in {path}: needs settings, not a single int; write {KEY: VALUE}"),
        ("model: nano", "model in {path}: needs settings, not a single str; write {KEY: VALUE}"),
        ("optim: null", "optim in {path}: must not be null; write a value, or leave the key out"),
        ("batch: {ramp: [{tokens: 5}]}", "batch.ramp[0].sequences in {path} or the command line: must be given; write"),
        ("run: {name: '${x}'}", "run.name in {path} or the command line: Interpolation key 'x' not found"),
        ("model: {name: nanno}", "model.name=nanno is not known; use one of smoke, nano, mini, large"),
        ("model: {name: [nano]}", "model.name=['nano'] is not known; use one of smoke, nano, mini, large"),
    ],
)
def test_wrong_types(write: Write, text: str, sentence: str) -> None:
    path = write(text)
    assert refusal(path).startswith(sentence.replace("{path}", str(path)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2]", "holds no settings; it must be a YAML mapping such as `run: {name: mine}`"),
        ("5", "holds no settings; it must be a YAML mapping such as `run: {name: mine}`"),
        ("run: [1", "is not valid YAML: while parsing a flow sequence"),
        ("run: {steps: 1, steps: 2}", "found duplicate key steps"),
    ],
)
def test_broken_files(write: Write, text: str, words: str) -> None:
    sentence = refusal(write(text))
    assert sentence.startswith(str(write(text)))
    assert words in sentence


def test_missing_and_binary_files(tmp_path: Path) -> None:
    missing, binary = tmp_path / "missing", tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert refusal(missing) == f"the config {missing} does not exist; give a YAML file such as configs/smoke.yaml"
    near = tmp_path / "binry.yml"
    assert refusal(near) == f"the config {near} does not exist; did you mean {binary}?"
    assert refusal(tmp_path) == f"the config {tmp_path} is a folder; give a YAML file such as configs/smoke.yaml"
    assert refusal(binary) == f"{binary} is not UTF-8 text; give a YAML file"


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("run.steps", "run.steps is not a setting; write a.b=value"),
        ("=3", "=3 is not a setting; write a.b=value"),
        ("run.steps=[1", "the command line is not valid: while parsing a flow sequence"),
        ("optim.muon.lr=fast", "optim.muon.lr in the command line: 'fast' is not a number; write one"),
    ],
)
def test_broken_overrides(write: Write, word: str, sentence: str) -> None:
    assert refusal(write("run: {steps: 1}"), [word]).startswith(sentence)


def test_save_and_load(write: Write, tmp_path: Path) -> None:
    """Values other than the defaults: named maps, lists, tuples, None, huge integers, small floats."""
    words = [
        "run.steps=null", "run.tokens=17e12", "model.name=nano", "model.layers=9", "data.train.a=b",
        "data.mixture.a=0.3", "batch.ramp=[{tokens: 4.9e12, sequences: 8}]", "optim.adamw.betas=[0.8, 0.99]",
        "optim.adamw.eps=1e-12", "data.document_mask=true", "recompute=block", "run.name=ünïcode",
    ]  # fmt: skip
    config = load_config(write("{}"), words)
    saved = tmp_path / "config.yaml"
    save_config(config, saved)
    again = load_config(saved)
    assert again == config
    assert flatten(again) == flatten(config)
    assert [path.name for path in tmp_path.iterdir()].count("config.yaml") == 1
    assert not (tmp_path / "config.tmp").exists()


def test_flatten_names_every_setting() -> None:
    """Sections are expanded; named maps and lists are one value each."""
    config = RunConfig()
    config.data.train = {"a": "x"}
    config.batch.ramp = [RampEntryConfig(5, 8)]
    flat = flatten(config)
    assert flat["data.train"] == {"a": "x"}
    assert flat["batch.ramp"] == [{"tokens": 5, "sequences": 8}]
    assert flat["model.width"] == 256
    assert flat["recompute"] == "none"
    assert {key.split(".")[0] for key in flat} == set(RunConfig.__dataclass_fields__)


def test_a_whole_map_replaces_and_a_dotted_name_adds(write: Callable[[str], Path]) -> None:
    """data.train={b: y} replaces the file's sources; data.train.b=y adds one."""
    path = write("run: {steps: 1}\ndata: {train: {a: x}, mixture: {a: 2}}\n")
    replaced = load_config(path, ["data.train={b: y}", "data.mixture={}"]).data
    assert (replaced.train, replaced.mixture) == ({"b": "y"}, {})
    added = load_config(path, ["data.train.b=y", "data.mixture.b=1"]).data
    assert (added.train, added.mixture) == ({"a": "x", "b": "y"}, {"a": 2, "b": 1})


@pytest.mark.parametrize("value", ["auto", "on", "off"])
def test_switches_are_words(tmp_path: Path, value: str) -> None:
    """YAML reads on and off as booleans, in a file and on the command line."""
    path = tmp_path / "run.yaml"
    path.write_text(f"run: {{steps: 1}}\nparallel: {{defer_reduce: {value}}}\n")
    config = load_config(path, [f"optim.muon.share={value}"])
    assert (config.parallel.defer_reduce, config.optim.muon.share) == (value, value)
