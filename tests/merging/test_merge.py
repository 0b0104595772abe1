"""Whole merges: with the methods on tensors in memory, with transformers and load_hf, in every layout and split."""

import json
from pathlib import Path

import pytest
import torch

from tests.interop.small_model import CONFIG
from tests.merging import transcriptions
from tests.merging.conftest import child, edit_json, fuse, recipe, rewrite, tensors_of
from tests.merging.test_methods import CASES, parameters_of
from trinity.interop import load_hf
from trinity.interop.tensors import part_shape
from trinity.interop.verify import largest_logit_difference
from trinity.interop.weight_map import weight_map
from trinity.merging import merge
from trinity.merging.merge_models import Merger
from trinity.merging.methods import METHODS
from trinity.merging.plan import make_plan
from trinity.merging.recipe import read_recipe
from trinity.merging.tensors import model_tensors

SMOOTH = ("norm", "expert_bias", "router")
EVERY = {"match": ".", "method": "ties"}


def formula(name: str, tensors: list[dict], base: dict | None, tensor: str, **parameters: object) -> torch.Tensor:
    """The transcription of a method on one tensor."""
    rows = [each[tensor].double().reshape(-1, each[tensor].shape[-1]) for each in tensors]
    origin = None if base is None else base[tensor].double().reshape(rows[0].shape)
    return getattr(transcriptions, name)(rows, origin, **parameters).view(tensors[0][tensor].shape)


def test_names_and_shapes_are_those_of_the_weight_map() -> None:
    """The table of layers against the table of parts, with the shapes of the model's own parameters."""
    state = child(0).state_dict()
    expected = {name: part_shape(state[parameter].shape, index) for name, parameter, index in weight_map(CONFIG)}
    assert {described.name: described.shape for described in model_tensors(CONFIG)} == expected
    kinds = {described.name: described.kind for described in model_tensors(CONFIG)}
    assert {name for name, kind in kinds.items() if kind != "matrix"} == {
        name for name in expected if any(word in name for word in ("norm", "router", "expert_bias"))
    }


def test_ties_with_the_formula(family: Path) -> None:
    """Matrices by TIES; gains, biases and routers by task arithmetic; the folder loads everywhere."""
    content = recipe("ties", "abc", True, parameters={"density": 0.5, "lambda": 0.9})
    merged = merge(content, family / "out")
    count = len(list(model_tensors(CONFIG)))
    assert str(merged) == f"{4 * count} tensors read, {count} written, 0 dropped"
    base, *models = (tensors_of(family / name) for name in ("base", "a", "b", "c"))
    result = tensors_of(family / "out")
    assert result.keys() == base.keys()
    weight = [0.5, 0.3, 0.4]
    for name, tensor in result.items():
        if any(word in name for word in SMOOTH):
            arguments = ("task_arithmetic", {"weight": weight, "normalize": True, "lambda_": 0.9})
        else:
            arguments = ("ties", {"weight": weight, "density": [0.5] * 3, "normalize": True, "lambda_": 0.9})
        expected = formula(arguments[0], models, base, name, **arguments[1])
        # the cut is by fp32 differences in the code and by exact ones in the formula; no two are that close here
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7, msg=name)
    tokens = torch.randint(CONFIG.vocab_size, (2, 19), generator=torch.Generator().manual_seed(3))
    difference, largest = largest_logit_difference(family / "out", family / "out", tokens)
    assert difference < 1e-5 * largest  # another order of fp32 sums


def entry_of(name: str, number: int, parameters: dict) -> dict:
    """A model of a recipe with its share of a method's parameters."""
    return {
        "model": name,
        "parameters": {key: value[number] for key, value in parameters.items() if type(value) is list},
    }


@pytest.mark.parametrize("method", METHODS)
def test_every_method_from_recipe_to_folder(family: Path, method: str) -> None:
    """All tensors by the method; one of each kind compared with the formula, for those that draw nothing."""
    count, parameters = next(((n, p) for name, n, p in CASES if name == method), (3, parameters_of(method, 3)))
    whole = {key.rstrip("_"): value for key, value in parameters.items() if type(value) is not list}
    content = {
        "merge_method": method, "parameters": whole | ({"rescale": True} if "rescale" in whole else {}),
        "models": [entry_of(name, number, parameters) for number, name in enumerate("abc"[:count])],
    }  # fmt: skip
    if method != "passthrough":
        content["rules"] = [{"match": ".", "method": method}]
    if METHODS[method].base == "yes":
        content["base_model"] = "base"
    assert merge(content, family / "out").dropped == 0
    base, *models = (tensors_of(family / name) for name in ("base", *"abc"[:count]))
    result = tensors_of(family / "out")
    for name in (
        "self_attn.k_proj.weight",
        "mlp.expert_bias",
        "mlp.experts.3.down_proj.weight",
        "mlp.router.gate.weight",
    ):
        if hasattr(transcriptions, method):
            name = f"model.layers.3.{name}"
            origin = base if METHODS[method].base == "yes" else None
            expected = formula(method, models, origin, name, **parameters)
            torch.testing.assert_close(result[name].double(), expected, rtol=2e-6, atol=2e-7, msg=name)


def test_transformers_misses_no_key(family: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merge(recipe(out_dtype="bfloat16"), family / "out", max_shard_bytes=100_000)
    _, info = AutoModelForCausalLM.from_pretrained(family / "out", dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert AutoTokenizer.from_pretrained(family / "out").encode("the rain") == AutoTokenizer.from_pretrained(
        family / "a"
    ).encode("the rain")


def test_rules_and_filters(family: Path) -> None:
    """A rule for every tensor, one that copies the router from a model, and a filter; the first rule counts."""
    rules = [{"match": r"router", "method": "passthrough", "model": "b"}, EVERY]
    filters = [{"filter": "self_attn", "value": 0.1}, {"filter": "*", "value": 0.8}]
    merge(recipe("ties", base=True, rules=rules, parameters={"density": filters}), family / "out")
    base, a, b = (tensors_of(family / name) for name in ("base", "a", "b"))
    for name, tensor in tensors_of(family / "out").items():
        if "router" in name:
            assert torch.equal(tensor, b[name])
            continue
        density = [0.1 if "self_attn" in name else 0.8] * 2
        expected = formula("ties", [a, b], base, name, weight=[0.5, 0.3], density=density, normalize=True, lambda_=1.0)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7, msg=name)


def test_gradient_over_layers(family: Path) -> None:
    """Embedding, norm and head take the first value; the layers those between."""
    content = recipe("linear", "ab", parameters={"normalize": False})
    content["models"][0]["parameters"]["weight"] = [0.0, 1.0, 0.0]
    merge(content, family / "out")
    a, b, result = (tensors_of(family / name) for name in ("a", "b", "out"))
    for name, tensor in result.items():
        layer = int(name.split(".")[2]) if "layers" in name else 0
        weight = [0.0, 0.5, 1.0, 0.5, 0.0][layer]
        torch.testing.assert_close(tensor, weight * a[name] + 0.3 * b[name], rtol=1e-6, atol=1e-7)


def test_slices_stack_layers(family: Path) -> None:
    """Layers 0-3 of a, then 0.7·a + 0.3·b of layers 1-4 (which keeps every fourth layer global), embedding of a."""
    sources = [{"model": name, "layer_range": [1, 5], "parameters": {"weight": w}} for name, w in (("a", 7), ("b", 3))]
    sources[0]["layer_range"] = sources[1]["layer_range"] = [4, 5]
    content = {
        "merge_method": "linear", "parameters": {"weight": 1},
        "slices": [{"sources": [{"model": "a", "layer_range": [0, 4]}]}, {"sources": sources}, {"sources": sources}],
    }  # fmt: skip
    merged = merge(content, family / "out")
    a, b, result = (tensors_of(family / name) for name in ("a", "b", "out"))
    assert merged.dropped == 0
    raw = json.loads((family / "out" / "config.json").read_text())
    assert raw["num_hidden_layers"] == len(raw["layer_types"]) == 6
    model = load_hf(family / "out")
    assert model.config.layers == 6
    assert torch.equal(result["model.layers.3.self_attn.q_proj.weight"], a["model.layers.3.self_attn.q_proj.weight"])
    for layer in (4, 5):
        name = "mlp.experts.2.down_proj.weight"
        old = f"model.layers.4.{name}"
        torch.testing.assert_close(result[f"model.layers.{layer}.{name}"], 0.7 * a[old] + 0.3 * b[old])
    head = "lm_head.weight"
    torch.testing.assert_close(result[head], 0.7 * a[head] + 0.3 * b[head])


@pytest.mark.parametrize("layers", [range(2, 5), range(3, 4)], ids=["fused", "mixed"])
def test_fused_layouts(family: Path, layers: range) -> None:
    """Stacks of experts in one model, some layers or all, and matrices in the other: the same bytes."""
    merge(recipe("ties", base=True), family / "expected")
    rewrite(family / "a", lambda tensors: fuse(tensors, layers))
    merged = merge(recipe("ties", base=True), family / "out")
    assert same_weights(family / "expected", family / "out")
    assert str(merged).endswith(" 0 dropped")


def same_weights(first: Path, second: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    one, two = tensors_of(first), tensors_of(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_workers_and_file_sizes_change_no_bit(family: Path) -> None:
    content = recipe("dare_ties", "abc", True, parameters={"density": 0.5})
    merge(content, family / "one")
    for number, (workers, size) in enumerate([(4, 10**9), (1, 50_000), (3, 50_000)]):
        merge(content, family / f"out{number}", workers=workers, max_shard_bytes=size)
        assert same_weights(family / "one", family / f"out{number}")
    assert (family / "one" / "model.safetensors").read_bytes() == (family / "out0" / "model.safetensors").read_bytes()
    for path in (family / "out1").iterdir():
        assert path.read_bytes() == (family / "out2" / path.name).read_bytes()


def test_another_seed_drops_other_entries(family: Path) -> None:
    content = recipe("dare_linear", "a", True, parameters={"density": 0.5})
    merge(content, family / "one")
    merge(content | {"seed": 1}, family / "two")
    assert not same_weights(family / "one", family / "two")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", None])
def test_data_types(family: Path, dtype: str | None) -> None:
    """Matrices in the wished type, rounded once; all others in fp32."""
    merge(recipe(), family / "exact")
    merge(recipe(**({"dtype": dtype} if dtype else {})), family / "out")
    exact, out = tensors_of(family / "exact"), tensors_of(family / "out")
    for name, tensor in out.items():
        wished = torch.float32 if dtype is None or any(word in name for word in SMOOTH) else getattr(torch, dtype)
        assert tensor.dtype == wished
        assert torch.equal(tensor, exact[name].to(wished))
    assert json.loads((family / "out" / "config.json").read_text())["dtype"] == (dtype or "float32")


def test_files_of_the_donor(family: Path) -> None:
    """Config, code and generation config come from the base; unknown keys of its config stay."""
    edit_json(family / "base" / "config.json", auto_map={"AutoModel": "modeling.X"}, torch_dtype="float32")
    (family / "base" / "modeling.py").write_text("X = 1\n")
    edit_json(family / "base" / "generation_config.json", temperature=0.7)
    (family / "base" / "chat_template.jinja").write_text("{{ messages }}")
    merge(recipe("task_arithmetic", base=True, out_dtype="bfloat16"), family / "out")
    raw = json.loads((family / "out" / "config.json").read_text())
    assert raw == json.loads((family / "base" / "config.json").read_text()) | {
        "dtype": "bfloat16", "torch_dtype": "bfloat16",
    }  # fmt: skip
    generation = json.loads((family / "out" / "generation_config.json").read_text())
    assert generation == json.loads((family / "base" / "generation_config.json").read_text())
    for name in ("modeling.py", "tokenizer.json", "chat_template.jinja"):
        assert (family / "out" / name).read_bytes() == (family / "base" / name).read_bytes()
    assert "task_arithmetic" in (family / "out" / "merge_recipe.yaml").read_text()


def test_the_plan_says_what_happens(family: Path) -> None:
    plan = make_plan(read_recipe(recipe("ties", base=True, out_dtype="bfloat16")))
    merge(recipe("ties", base=True, out_dtype="bfloat16"), family / "out")
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(family / "out").values())
    assert plan.bytes_written == size
    inputs = [tensor for name in ("base", "a", "b") for tensor in tensors_of(family / name).values()]
    assert plan.bytes_read == sum(tensor.numel() * tensor.element_size() for tensor in inputs)
    assert plan.tensors_read == len(inputs)
    written = sum(path.stat().st_size for path in (family / "out").glob("*.safetensors"))
    assert sum(file.bytes for file in Merger(plan, family / "x").files) == written
    summary = plan.summary(1)
    assert f"{len(inputs)} tensors" in summary
    assert "ties for" in summary
    assert "memory:   at most" in summary


def test_mergekit_words(family: Path) -> None:
    """modules, {path: …}, int8_mask, numbers that YAML reads as texts."""
    plain = recipe("ties", base=True, parameters={"density": 0.5})
    models = [each | {"model": {"model": {"path": each["model"]}}} for each in plain["models"]]
    other = {
        "merge_method": "ties", "base_model": {"path": "base"}, "modules": {"default": {"models": models}},
        "parameters": {"density": "5e-1", "int8_mask": True}, "dtype": "float32",
    }  # fmt: skip
    merge(plain, family / "one")
    merge(other, family / "two")
    assert same_weights(family / "one", family / "two")
