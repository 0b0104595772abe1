"""Variables of a search: which tensors each is for, and the recipe at given values."""

from pathlib import Path

import pytest

from tests.interop.small_model import CONFIG
from tests.merging.conftest import recipe
from trinity.merging.search.search_file import PARTS, read_search
from trinity.merging.search.space import SearchSpace, block_layers, part_filters
from trinity.merging.tensors import model_tensors

NAMES = [described.name for described in model_tensors(CONFIG)]
DENSE = [layer < CONFIG.dense_layers for layer in range(CONFIG.layers)]


def part_of(name: str) -> str:
    """By hand."""
    if "self_attn" in name:
        return "attention"
    if ".experts." in name or "shared_experts" in name:
        return "experts"
    return "router" if "router" in name or "expert_bias" in name else "rest"


def space(*vary: dict, **changes: object) -> SearchSpace:
    content = recipe("ties", "ab", True) | changes
    search = {"vary": list(vary), "objectives": [{"name": "x", "text": "x"}], "budget": {"trials": 1}}
    return SearchSpace(read_search(content | {"search": search}))


def test_parts_are_a_partition() -> None:
    """Every tensor has the filters of its part in its name, and those of no other."""
    for name in NAMES:
        found = [part for part in PARTS if any(each in name for each in part_filters(part, None, DENSE))]
        assert found == [part_of(name)]
        layers = [layer for layer in range(5) if f"layers.{layer}." in name]
        by_layer = [(part, layer) for part in PARTS for layer in range(5)
                    if any(each in name for each in part_filters(part, [layer], DENSE))]  # fmt: skip
        assert by_layer == [(part_of(name), layer) for layer in layers]
    assert [list(each) for each in block_layers(5, 2)] == [[0, 1], [2, 3, 4]]
    # layers 1 and 11 are not confused
    assert not any(
        each in "model.layers.11.self_attn.q_proj.weight" for each in part_filters("attention", [1], DENSE * 3)
    )


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_each_tensor_gets_its_variable(family: Path, blocks: int) -> None:
    """With all values different, the plan's arguments name the variable of each tensor."""
    made = space({"parameter": "weight", "between": [0, 100], "models": ["b"], "parts": list(PARTS), "blocks": blocks})
    values = [float(number) for number in range(1, 1 + len(made.variables))]
    ranges = block_layers(5, blocks)
    for job in made.jobs(values):
        layer = (
            0 if "embed" in job.name else 4 if not job.name.startswith("model.layers") else int(job.name.split(".")[2])
        )
        block = next(layers for layers in ranges if layer in layers)
        where = f", layers {block[0]}-{block[-1]}" if blocks > 1 else ""
        wanted = f"weight of b, {part_of(job.name)}{where}"
        number = [variable.name for variable in made.variables].index(wanted)
        assert job.arguments["weight"] == [0.5, values[number]], job.name


def test_other_tensors_keep_the_recipe(family: Path) -> None:
    """Numbers, gradients and filters of the recipe hold where nothing varies; tied and whole parameters."""
    filters = [{"filter": "q_proj", "value": 0.9}, {"filter": "*", "value": [0.1, 0.3]}]
    models = [{"model": "a", "parameters": {"weight": filters}}, {"model": "b", "parameters": {"weight": 0.5}}]
    vary = {"parameter": "weight", "between": [0, 1], "models": ["a"], "parts": ["router"]}
    made = space(vary, {"parameter": "density", "between": [0.1, 1], "tied": True},
                 {"parameter": "lambda", "between": [0.5, 2]}, models=models, parameters={"lambda": 1.5})  # fmt: skip
    names = ["weight of a, router", "density", "lambda"]
    assert [variable.name for variable in made.variables] == names
    assert made.start == [0.5, 0.55, 1.5]
    jobs = {job.name: job.arguments for job in made.jobs([0.75, 0.25, 1.25])}
    assert jobs["model.layers.3.mlp.router.gate.weight"]["weight"] == [0.75, 0.5]
    assert jobs["model.layers.4.self_attn.q_proj.weight"] == {
        "weight": [0.9, 0.5], "density": [0.25, 0.25], "lambda_": 1.25, "normalize": True,
    }  # fmt: skip
    assert jobs["model.layers.4.mlp.experts.1.up_proj.weight"]["weight"] == [0.3, 0.5]
    content = made.recipe_content([0.75, 0.25, 1.25])
    assert content["models"][1]["parameters"] == {"weight": 0.5, "density": 0.25}
    assert content["parameters"] == {"lambda": 1.25}


def test_slices_and_modules(family: Path) -> None:
    """A model's parameter varies wherever the recipe names it."""
    slices = [
        {"sources": [{"model": name, "layer_range": layers} for name in ("a", "b")]} for layers in ([0, 3], [3, 5])
    ]
    vary = {"parameter": "weight", "between": [0, 1]}
    search = {"vary": [vary], "objectives": [{"name": "x", "text": "x"}], "budget": {"trials": 1}}
    made = SearchSpace(read_search({"merge_method": "linear", "modules": {"default": {"slices": slices}},
                                    "search": search}))  # fmt: skip
    assert [variable.name for variable in made.variables] == ["weight of a", "weight of b"]
    assert {tuple(job.arguments["weight"]) for job in made.jobs([0.25, 0.5])} == {(0.25, 0.5)}
