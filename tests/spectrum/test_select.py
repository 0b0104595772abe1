"""Modules and units of a folder, the choice among them, and YAML in both languages."""

from pathlib import Path

import pytest
import yaml

from trinity.errors import UserError
from trinity.interop.weight_map import weight_map
from trinity.models import Trinity
from trinity.models.freeze import trained_parameters
from trinity.spectrum.modules import Unit, find_modules, find_units, open_weights, sampled
from trinity.spectrum.scores import Score
from trinity.spectrum.select import axolotl_yaml, choose, chosen_without_signal, read_axolotl, train_only_yaml


def units_of(path: Path) -> list[Unit]:
    source = open_weights(str(path))
    return find_units(source, find_modules(source))


def by_layer(units: list[Unit]) -> dict[str, Score]:
    """A score that grows with the layer."""
    return {
        tensor: Score(unit.layer or 0, 10 * (unit.layer or 0), unit.layer or 0)
        for unit in units
        for tensor in unit.tensors()
    }


def test_units_are_the_parameters(folder: Path) -> None:
    """Every parameter is one unit, whose name train.only takes for this parameter alone; experts count once."""
    source = open_weights(str(folder))
    units = units_of(folder)
    names = [name for name, _ in Trinity(source.config).named_parameters()]
    assert len(units) == len(names)
    found = set().union(*(trained_parameters(names, [unit.name]) for unit in units))
    assert found == set(names)
    assert all(len(trained_parameters(names, [unit.name])) == 1 for unit in units)
    stack = next(unit for unit in units if unit.name == "blocks.3.ffn.experts.gate_up")
    assert [module.name for module in stack.modules] == [
        f"model.layers.3.mlp.experts.*.{half}_proj" for half in ("gate", "up")
    ]
    assert len(stack.tensors()) == 2 * source.config.experts
    assert {tensor for unit in units for tensor in unit.tensors()} == {
        tensor for tensor, _, _ in weight_map(source.config) if not tensor.endswith("expert_bias")
    }


def test_choice(folder: Path) -> None:
    """The last layers of each type, of several units one at least; embedding and head; gains by `spectrum` alone."""
    units = units_of(folder)
    chosen = [unit.name for unit in choose(units, by_layer(units), "mp", 40)]
    assert {"embed", "head", "blocks.3.attention.qkvg", "blocks.4.attention.qkvg"} <= set(chosen)
    assert "blocks.2.attention.qkvg" not in chosen
    assert "blocks.4.ffn.experts.down" in chosen  # int(3·0.4) = 1
    assert "blocks.3.ffn.experts.down" not in chosen
    assert "blocks.1.ffn.down" in chosen  # int(2·0.4) = 0
    assert not [name for name in chosen if "norm" in name]
    equal = dict.fromkeys(by_layer(units), Score(1.0, 0.0, 0))
    gains = [unit.name for unit in choose(units, equal, "spectrum", 40) if unit.type == "attention_norm"]
    assert gains == ["blocks.0.attention_norm", "blocks.1.attention_norm"]


def test_modules_without_signal(folder: Path) -> None:
    """Counted by type where they train; not embedding and head, which train always, nor gains, which `mp` freezes."""
    units = units_of(folder)
    scores = by_layer(units)
    assert chosen_without_signal(choose(units, scores, "mp", 40), scores, "mp") == {}
    assert chosen_without_signal(choose(units, scores, "mp", 99), scores, "mp") == {}  # layer 0 has 0, and is left out
    zero = dict.fromkeys(scores, Score(1.0, 0.0, 0))
    found = chosen_without_signal(choose(units, zero, "mp", 40), zero, "mp")
    assert found["attention.qkvg"] == 2
    assert found["ffn.experts.down"] == found["ffn.down"] == 1
    assert found.keys() == {unit.type for unit in units if not unit.is_vector} - {"embed", "head"}
    assert chosen_without_signal(choose(units, zero, "spectrum", 40), zero, "spectrum") == {}


def test_median_over_experts(folder: Path) -> None:
    """One expert with a huge score does not choose its stack."""
    units = units_of(folder)
    scores = dict.fromkeys(by_layer(units), Score(1.0, 1.0, 1))
    scores["model.layers.2.mlp.experts.0.down_proj.weight"] = Score(1e9, 1e9, 9)
    scores |= {f"model.layers.4.mlp.experts.{e}.down_proj.weight": Score(1.1, 1.1, 1) for e in range(6)}
    chosen = choose(units, scores, "mp", 34)
    assert [unit.layer for unit in chosen if unit.type == "ffn.experts.down"] == [4]


def test_sample(folder: Path) -> None:
    """Some experts at equal distances; a single matrix is always scored."""
    modules = {module.name: module for module in find_modules(open_weights(str(folder)))}
    stack = modules["model.layers.2.mlp.experts.*.up_proj"]
    assert sampled(stack, 3) == [f"model.layers.2.mlp.experts.{e}.up_proj.weight" for e in (0, 2, 4)]
    assert sampled(stack, 99) == sampled(stack, None) == stack.tensors
    assert len(sampled(modules["lm_head"], 1)) == 1


def test_yaml_there_and_back(folder: Path, tmp_path: Path) -> None:
    """axolotl's list names the same units, and ours is a config's section."""
    units = units_of(folder)
    chosen = choose(units, by_layer(units), "mp", 25)
    (tmp_path / "a.yaml").write_text(axolotl_yaml(chosen, "x"))
    assert read_axolotl(tmp_path / "a.yaml", units) == chosen
    assert yaml.safe_load(train_only_yaml(chosen, "x")) == {"train": {"only": [unit.name for unit in chosen]}}
    entries = yaml.safe_load((tmp_path / "a.yaml").read_text())["unfrozen_parameters"]
    assert "^model.embed_tokens.weight$" in entries
    assert "^model.layers.4.mlp.experts.gate_up_proj$" in entries
    assert "^model.layers.4.mlp.experts.[0-9]+.up_proj.weight$" in entries


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("model.layers.1.mlp.gate_proj", ["blocks.1.ffn.gate_up"]),
        ("model.layers.2.mlp.router.gate", ["blocks.2.ffn.router"]),
        ("^lm_head.weight$", ["head"]),
        ("model.layers.3.mlp.experts.down_proj", ["blocks.3.ffn.experts.down"]),
        ("model.layers.[34].self_attn.o_proj", ["blocks.3.attention.out", "blocks.4.attention.out"]),
        ("model.layers.1.mlp", ["blocks.1.ffn.gate_up", "blocks.1.ffn.down"]),
    ],
)
def test_entries_of_axolotl(folder: Path, tmp_path: Path, entry: str, expected: list[str]) -> None:
    """Tensors, modules, expressions and stacks, matched whole."""
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"unfrozen_parameters": [entry], "base_model": "x"}))
    assert [unit.name for unit in read_axolotl(tmp_path / "a.yaml", units_of(folder))] == expected


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("unfrozen_parameters: [model.layers.1.mlp.gate]", "names model.layers.1.mlp.gate, which is nothing"),
        ("unfrozen_parameters: ['model.embed_tokens.weight[:100]']", r"names rows of a tensor .* remove the range"),
        ("unfrozen_parameters: ['model.(']", "which is no regular expression"),
        ("unfrozen_parameters: []", "has no list unfrozen_parameters"),
        ("- a", "has no list unfrozen_parameters"),
        ("a: [", "is no YAML file"),
        (None, "does not exist"),
    ],
)
def test_wrong_lists_are_refused(folder: Path, tmp_path: Path, content: str | None, sentence: str) -> None:
    path = tmp_path / "a.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=sentence) as mistake:
        read_axolotl(path, units_of(folder))
    assert "\n" not in str(mistake.value)
