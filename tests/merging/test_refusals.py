"""Wrong recipes and models that do not fit: one sentence that names the mistake, exit code 2, nothing written."""

import json
import os
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.malformed.refusals import refusal
from tests.merging.conftest import child, edit_json, fuse, recipe, rewrite, tensors_of
from trinity.interop import export_hf
from trinity.merging import merge

GATE = "model.layers.3.mlp.experts.2.gate_proj.weight"
BIAS = "model.layers.3.mlp.expert_bias"


def models(*entries: dict) -> dict:
    return {"merge_method": "linear", "models": list(entries)}


def slices(*sources: tuple[str, list], method: str = "linear") -> dict:
    entries = [{"model": name, "layer_range": layers, "parameters": {"weight": 1}} for name, layers in sources]
    return {"merge_method": method, "slices": [{"sources": entries}]}


A, B = ({"model": name, "parameters": {"weight": 0.5}} for name in "ab")
RECIPES: dict[str, tuple[dict, str]] = {
    "an unknown key": (recipe(base_modle="base"), "unknown key 'base_modle'; did you mean base_model?"),
    "an unknown parameter": (
        models(A, {"model": "b", "parameters": {"wieght": 1}}), "models[1].parameters.wieght is no parameter of this "
        "recipe's methods; did you mean weight?",
    ),
    "a parameter of another method": (recipe(parameters={"density": 0.5}), "parameters.density is no parameter"),
    "a parameter in a place of its own": (recipe(density=0.5), "write it below parameters:"),
    "an unknown method": (recipe("tise", base=True), "merge_method 'tise' is unknown; did you mean ties?"),
    "a list as method": ({"merge_method": ["linear"], "models": [A]}, "merge_method ['linear'] is unknown"),
    "a list as a rule's method": (
        recipe(rules=[{"match": "experts", "method": ["linear"]}]), "rules[0].method ['linear'] is unknown",
    ),
    "a weight whose products fp32 does not hold": (
        models(A, {"model": "b", "parameters": {"weight": 1e39}}), "must be between -1e+15 and 1e+15",
    ),
    "a weight that float64 does not hold": (
        models(A, {"model": "b", "parameters": {"weight": 10**400}}), "must be between -1e+15 and 1e+15",
    ),
    "an unknown user": (models(A, {"model": "~nobody-here/b", "parameters": {"weight": 1}}), "does not exist"),
    "an epsilon whose bound is rounded": (
        recipe("della", base=True, parameters={"density": 0.1234567}), "use an epsilon of at most 0.123456",
    ),
    "a token as a number": (
        recipe(tokenizer={"source": "union", "tokens": {
            "a": {"source": {"kind": "model_token", "model": "a", "token": 5}}}}), "write token: TEXT in quotes",
    ),
    "an id as a text": (
        recipe(tokenizer={"source": "union", "tokens": {
            "a": {"source": {"kind": "model_token", "model": "a", "token_id": "5"}}}}), "token_id: WHOLE_NUMBER",
    ),
    "an id that is no whole number": (
        recipe(tokenizer={"source": "union", "tokens": {
            "a": {"source": {"kind": "model_token", "model": "a", "token_id": 1.5}}}}), "token_id: WHOLE_NUMBER",
    ),
    "padding beyond memory": (recipe(tokenizer={"pad_to_multiple_of": 10**13}), "at most 65536"),
    "a pattern that re cannot count": (
        recipe(rules=[{"match": "x{99999999999}", "method": "linear"}]), "is no regular expression",
    ),
    "no method": ({"models": [A, B]}, "has no merge_method"),
    "models and slices": (recipe() | slices(("a", [0, 5])), "has models and slices of models, slices and modules"),
    "no models": ({"merge_method": "linear"}, "has none of models, slices and modules"),
    "an empty list": ({"merge_method": "linear", "models": []}, "write a list with at least one entry"),
    "a module of another architecture": (
        {"merge_method": "linear", "modules": {"vision": {"models": [A]}}}, "write modules: {default: …}",
    ),
    "no weight": (models(A, {"model": "b"}), "linear needs a weight for b"),
    "a text as weight": (models(A, {"model": "b", "parameters": {"weight": "much"}}), "is 'much'; write a number"),
    "NaN as weight": (models(A, {"model": "b", "parameters": {"weight": float("nan")}}), "write a number"),
    "a density above 1": (recipe("ties", base=True, parameters={"density": 1.5}), "must be between 0 and 1"),
    "weights that cancel": (
        models(A, {"model": "b", "parameters": {"weight": -0.5}}), "the weights of linear sum to 0",
    ),
    "weights that cancel in one layer": (
        models(A, {"model": "b", "parameters": {"weight": [0.5, -0.5, 0.5]}}), "sum to 0 at model.layers.2.",
    ),
    "a switch that is a number": (recipe(parameters={"normalize": 1}), "normalize is 1; write true or false"),
    "a gradient of switches": (recipe(parameters={"normalize": [True, False]}), "only numbers have a gradient"),
    "a filter without a value": (recipe(parameters={"weight": [{"filter": "mlp"}]}), "{filter: PART_OF_A_NAME,"),
    "a filter after *": (
        recipe(parameters={"weight": [{"value": 1}, {"filter": "mlp", "value": 2}]}), "comes after '*'",
    ),
    "an epsilon that leaves 0 … 1": (
        recipe("della", base=True, parameters={"density": 0.9}), "use an epsilon of at most 0.1",
    ),
    "t beyond 1": ({"merge_method": "slerp", "base_model": "a", "models": [{"model": "b"}], "parameters": {"t": 2}},
                   "t of slerp is 2.0"),
    "no base": (recipe("ties"), "ties needs a base_model"),
    "too many models": (recipe("slerp", "abc", True, parameters={"t": 0.5}), "weight is no parameter"),
    "one model too many": (
        {"merge_method": "nearswap", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}],
         "parameters": {"t": 0.5}}, "nearswap merges 1 model besides base_model; the recipe gives 2",
    ),
    "a model too few": (
        {"merge_method": "model_stock", "base_model": "base", "models": [{"model": "a"}]},
        "model_stock merges at least 2 models besides base_model; the recipe gives 1",
    ),
    "a model twice": (models(A, A), "names a twice"),
    "a model under two names": (models(A, {"model": "./a", "parameters": {"weight": 1}}), "are the same model"),
    "a model that is not there": (models(A, {"model": "bb", "parameters": {"weight": 1}}), "did you mean b?"),
    "a file as model": (models(A, {"model": "a/config.json", "parameters": {"weight": 1}}), "is a file"),
    "a step of a folder": (models(A, {"model": "b@7", "parameters": {"weight": 1}}), "is not a run directory"),
    "a lora": (
        models(A, {"model": {"model": "b", "lora": {"path": "x"}}, "parameters": {"weight": 1}}), "has a lora",
    ),
    "layers that are not there": (slices(("a", [3, 9])), "layer_range [3, 9] goes beyond the 5 layers of a"),
    "ranges of two lengths": (slices(("a", [2, 4]), ("b", [2, 5])), "they must be equally long"),
    "a backward range": (slices(("a", [4, 2])), "write [first, end]"),
    "a dense and an MoE layer": (slices(("a", [0, 1]), ("b", [2, 3])), "a dense layer in"),
    "a local and a global layer": (slices(("a", [2, 3]), ("b", [3, 4])), "a global layer in"),
    "a dense layer after an MoE layer": (
        {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [2, 4]}]},
                                                   {"sources": [{"model": "a", "layer_range": [0, 2]}]}]},
        "dense layers must come first",
    ),
    "a rule that matches nothing": (
        recipe(rules=[{"match": "experts.99", "method": "linear"}]), "is found in no tensor's name",
    ),
    "a rule that changes nothing": (recipe(rules=[{"match": "experts"}]), "rules[0] changes nothing"),
    "a broken pattern": (recipe(rules=[{"match": "(", "method": "linear"}]), "is no regular expression"),
    "a rule for an unknown model": (
        recipe(rules=[{"match": "router", "method": "passthrough", "model": "c"}]), "c is none of the models",
    ),
    "an unknown data type": (recipe(out_dtype="fp8"), "out_dtype is 'fp8'; write one of float32"),
    "an unknown tokenizer": (recipe(tokenizer_source="c"), "none of base, union and the recipe's models"),
    "a tokenizer of a base that is not there": (recipe(tokenizer={"source": "base"}), "has no base_model"),
    "two tokenizers": (recipe(tokenizer_source="union", tokenizer={"source": "union"}), "keep tokenizer: {source: …}"),
    "a token that no tokenizer has": (
        recipe(tokenizer={"source": "union", "tokens": {"<|x|>": {"source": "a"}}}), "has no token '<|x|>'",
    ),
    "a padding of 0": (recipe(tokenizer={"pad_to_multiple_of": 0}), "whole number of at least 1"),
    "an unknown template": (recipe(chat_template="alpaca"), "write auto, chatml, a model of the recipe"),
    "a template of a model without one": (recipe(chat_template="a"), "which has none"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_wrong_recipes(family: Path, case: str) -> None:
    content, sentence = RECIPES[case]
    assert sentence in refusal(lambda: merge(content, family / "out"), family)


TEXTS = {
    "": "is no mapping", "[": "is not YAML", "- a": "is no mapping", "a: 1\na: 2": "a is written twice",
    "merge_method: linear\nmodels: x": "write a list", "\0": "is not YAML",
    "merge_method: 2001-99-99": "is not YAML", "merge_method: !!bool much": "is not YAML",
    "merge_method: !!timestamp x": "is not YAML", f"seed: {'9' * 5000}": "is not YAML",
    "models: &a [*a]": "has aliases that repeat",
    "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmnopqrstuvw")):
        "has aliases that repeat",
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_wrong_files(family: Path, text: str) -> None:
    (family / "recipe.yaml").write_text(text)
    assert TEXTS[text] in refusal(lambda: merge("recipe.yaml", family / "out"), family)
    assert "does not exist" in refusal(lambda: merge("nowhere.yaml", family / "out"), family)


def config(**values: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **values)


def weights(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, change)


def other_model(**changes: object) -> Callable[[Path], None]:
    def replace_by(folder: Path) -> None:
        export_hf(child(1, **changes), folder, folder.parent / "b", torch.float32, overwrite=True)

    return replace_by


def poison(name: str, value: float) -> Callable[[Path], None]:
    def change(tensors: dict) -> None:
        tensors[name].view(-1)[-1] = value

    return weights(change)


def other_dtype(dtype: torch.dtype) -> Callable[[Path], None]:
    def change(tensors: dict) -> None:
        tensors[GATE] = tensors[GATE].to(dtype)

    return weights(change)


def missing_file(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def short_file(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def file_outside(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][GATE] = "../b/model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def link_outside(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[0]
    path.rename(folder.parent / "outside.safetensors")
    path.symlink_to("../outside.safetensors")


def other_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    names = list(content["model"]["vocab"])
    content["model"]["vocab"][names[-1]], content["model"]["vocab"][names[-2]] = (
        content["model"]["vocab"][names[-2]], content["model"]["vocab"][names[-1]],
    )  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def twice(folder: Path) -> None:
    """One tensor in two files."""
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    copy = tensors_of(folder)
    header = struct.unpack("<Q", first.read_bytes()[:8])[0]
    name = next(key for key in json.loads(first.read_bytes()[8 : 8 + header]) if key != "__metadata__")
    second_header = struct.unpack("<Q", second.read_bytes()[:8])[0]
    names = [key for key in json.loads(second.read_bytes()[8 : 8 + second_header]) if key != "__metadata__"]
    save_file({key: copy[key] for key in [*names, name]}, second)


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "another θ of RoPE": (config(rope_theta=1e4, rope_parameters=None), "rope_theta is 10000.0 and 500.0"),
    "another route scale": (config(route_scale=1.0), "route_scale is 1.0 and 2.5"),
    "another number of active experts": (config(num_experts_per_tok=1), "active_experts is 1 and 2"),
    "another window": (config(sliding_window=5), "window is 5 and 7"),
    "other layer types": (config(layer_types=["full_attention"] * 5), "layer_types"),
    "tied heads": (config(tie_word_embeddings=True), "tie_word_embeddings=True is not supported"),
    "another architecture": (config(model_type="llama"), "model_type='llama' is not supported"),
    "quantised by its config": (config(quantization_config={"bits": 4}), "quantization_config"),
    "scaled RoPE": (config(rope_scaling={"rope_type": "yarn"}), "rope_scaling"),
    "another number of experts": (other_model(experts=7), "experts is 7 and 6"),
    "another number of layers": (other_model(layers=6), "layers is 6 and 5"),
    "another width": (other_model(width=32), "width is 32 and 24"),
    "another vocabulary size": (other_model(vocab_size=320), "vocab_size is 320 in a and 300 in b; write tokenizer"),
    "another tokenizer": (other_tokenizer, "the tokenizers of a and b differ: the token"),
    "a missing tensor": (
        weights(lambda tensors: tensors.pop(GATE)), f"a lacks tensors that its config.json asks for: {GATE}",
    ),
    "no head": (weights(lambda tensors: tensors.pop("lm_head.weight")), "lacks tensors"),
    "an unknown tensor": (
        weights(lambda tensors: tensors.update({"model.layers.2.mlp.extra": torch.zeros(3)})), "layers.2.mlp.extra",
    ),
    "a tensor of another shape": (
        weights(lambda tensors: tensors.update({BIAS: torch.zeros(7)})), f"{BIAS} has shape (7,), not (6,)",
    ),
    "a stack with an expert too few": (
        weights(lambda tensors: tensors.update({"model.layers.3.mlp.experts.gate_up_proj": torch.zeros(5, 32, 24)})),
        "twice",
    ),
    "a stack whose gates and ups are not equally many": (
        weights(lambda tensors: (fuse(tensors, range(2, 3)), tensors.update(
            {"model.layers.2.mlp.experts.gate_up_proj": torch.zeros(6, 33, 24)}))), "a lacks tensors",
    ),
    "a special token that the tokenizer lacks": (
        lambda folder: edit_json(folder / "tokenizer_config.json", eos_token="<|no|>"), "names the token '<|no|>'",
    ),
    "a chat template that is a number": (
        lambda folder: edit_json(folder / "tokenizer_config.json", chat_template=5), "is 5, no text",
    ),
    "a chat template of bytes": (
        lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff"), "chat_template.jinja",
    ),
    "fp8 weights": (other_dtype(torch.float8_e4m3fn), "F8_E4M3: quantised weights are not merged"),
    "int8 weights": (other_dtype(torch.int8), "I8: quantised weights are not merged"),
    "NaN": (poison(GATE, float("nan")), f"{GATE} of a holds NaN or infinity"),
    "infinity in a bias": (poison(BIAS, float("inf")), f"{BIAS} of a holds NaN or infinity"),
    "a missing file": (missing_file, "is missing or not a file"),
    "a short file": (short_file, "is not a whole safetensors file"),
    "pickled weights": (pickled, "pickled weights are not read"),
    "a file outside of the folder": (file_outside, "only names of safetensors files in the folder are read"),
    "a link out of the folder": (link_outside, "is a link out of the folder"),
    "a tensor twice": (twice, "twice"),
    "a LoRA adapter": (adapter, "is a LoRA adapter"),
    "a broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "neither a config.json nor a config.yaml"),
    "a tokenizer without tokens": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"), "is no tokenizer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_models_that_do_not_fit(family: Path, case: str) -> None:
    """Only model a is damaged; nothing but it and no folder is left changed."""
    damage, sentence = MODELS[case]
    damage(family / "a")
    assert sentence in refusal(lambda: merge(recipe(), family / "out"), family)


def test_overflow_in_the_output(family: Path) -> None:
    poison(GATE, 1e5)(family / "a")
    content = models({"model": "a", "parameters": {"weight": 1}})
    sentence = refusal(lambda: merge(content | {"out_dtype": "float16"}, family / "out"), family)
    assert f"{GATE} becomes infinite in torch.float16" in sentence
    merge(content | {"out_dtype": "bfloat16"}, family / "out")


def test_a_folder_that_holds_something_else(family: Path) -> None:
    (family / "out").mkdir()
    (family / "out" / "thesis.txt").write_text("x")
    assert "is not an earlier export" in refusal(lambda: merge(recipe(), family / "out", overwrite=True), family)
    merge(recipe(), family / "two")
    assert "--overwrite" in refusal(lambda: merge(recipe(), family / "two"), family)
    merge(recipe(), family / "two", overwrite=True)


def test_a_folder_that_the_end_could_not_replace(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of the merge, also through a link; a mount point; a foreign link in the temporary name."""
    (family / "link").symlink_to("a")
    for name in ("a", "link"):
        sentence = refusal(lambda name=name: merge(recipe(), family / name, overwrite=True), family)
        assert "a model of this merge" in sentence
    (family / "empty").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: Path(path).name == "empty")
        assert "is a mount point" in refusal(lambda: merge(recipe(), family / "empty"), family)
    (family / "mine").mkdir()
    (family / "mine" / "thesis.txt").write_text("x")
    (family / ".out.partial").symlink_to("mine")
    assert "is in the way" in refusal(lambda: merge(recipe(), family / "out"), family)


def test_more_than_thirty_wrong_inputs() -> None:
    assert len(RECIPES) + len(MODELS) > 60
    assert all(yaml.safe_load(yaml.safe_dump(content)) for content, _ in RECIPES.values())
