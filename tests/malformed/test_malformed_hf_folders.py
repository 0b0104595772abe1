"""Malformed Hugging Face folders: config.json, index and safetensors files with wrong content."""

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.malformed.refusals import refusal, replace_by_dangling_link, replace_by_folder, replace_by_loop
from trinity.interop import load_hf

INDEX = "model.safetensors.index.json"
SIZES = [
    "vocab_size", "hidden_size", "num_hidden_layers", "num_dense_layers", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "sliding_window", "global_attn_every_n_layers", "num_experts",
    "num_experts_per_tok", "num_shared_experts", "moe_intermediate_size", "max_position_embeddings",
]  # fmt: skip
NUMBERS = ["route_scale", "rms_norm_eps"]
CONFIG_KEYS = {
    "hidden_size": "model.width", "num_hidden_layers": "model.layers", "num_dense_layers": "model.dense_layers",
    "intermediate_size": "model.dense_width", "num_attention_heads": "model.heads", "route_scale": "model.route_scale",
    "num_key_value_heads": "model.kv_heads", "sliding_window": "model.window", "rms_norm_eps": "model.norm_eps",
    "global_attn_every_n_layers": "model.global_every", "num_experts": "model.experts",
    "num_experts_per_tok": "model.active_experts", "num_shared_experts": "model.shared_experts",
    "moe_intermediate_size": "model.expert_width", "max_position_embeddings": "model.max_positions",
    "vocab_size": "model.vocab_size", "head_dim": "model.head_dim",
}  # fmt: skip
"""Key of config.json → key of Trinity's config, which the message for a number out of range names."""
FIXED = {
    "model_type": ["llama", None, 5, []], "hidden_act": ["gelu", 5], "attention_bias": [True, "no"],
    "attention_dropout": [0.1, math.nan], "tie_word_embeddings": [True], "score_func": ["softmax"],
    "route_norm": [False], "n_group": [2, "1"], "topk_group": [2], "num_expert_groups": [2], "num_limited_groups": [2],
    "mup_enabled": [False, None], "rope_scaling": [{"rope_type": "yarn"}, 5], "quantization_config": [{}, {"bits": 4}],
    "rope_parameters": [[], "x", {"rope_type": "yarn"}, {"factor": 2}],
    "layer_types": [[], "x", {}, ["sliding_attention"], [None] * 4, ["full_attention"] * 4],
}  # fmt: skip
"""Key of config.json → values of another architecture."""


def refusal_of(hf: Path) -> str:
    """The error message of load_hf for the folder."""
    return refusal(lambda: load_hf(hf), hf)


def refusal_of_config(hf: Path, **values: Any) -> str:
    """The error message for a folder whose config.json has these values."""
    path = hf / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | values))
    sentence = refusal_of(hf)
    path.write_text(json.dumps(raw))
    return sentence


@pytest.mark.parametrize("key", [*SIZES, *NUMBERS])
def test_a_number_of_the_config(hf: Path, key: str, limited_memory: None) -> None:
    """Of another type, not finite, 0, negative, of 400 digits: the message names the key, of either config."""
    for value in ["word", [], {}, True, math.nan, math.inf, -1, 10**400, *([1.5, 1e308] if key in SIZES else [])]:
        sentence = refusal_of_config(hf, **{key: value})
        assert key in sentence or CONFIG_KEYS[key] in sentence, value
    if key != "num_dense_layers":
        assert f"{CONFIG_KEYS[key]}=0" in refusal_of_config(hf, **{key: 0})
    if key not in (
        "global_attn_every_n_layers",
        "num_key_value_heads",
    ):  # optional in transformers too
        assert key in refusal_of_config(hf, **{key: None})


@pytest.mark.parametrize("size", [10**6, 10**12, 2**60, 2**62])
@pytest.mark.parametrize("key", [key for key in SIZES if key not in ("sliding_window", "max_position_embeddings")])
def test_enormous_sizes(hf: Path, key: str, size: int, limited_memory: None) -> None:
    """Refused before memory is taken: by the names or shapes of the tensors, or as larger than any machine holds."""
    if key != "global_attn_every_n_layers":
        refusal_of_config(hf, **{key: size})
    refusal_of_config(hf, **{key: size + 1, "layer_types": None, "num_hidden_layers": size})


@pytest.mark.parametrize("key", FIXED)
def test_another_model(hf: Path, key: str) -> None:
    for value in FIXED[key]:
        assert f"config.json: {key}" in refusal_of_config(hf, **{key: value}), value


@pytest.mark.parametrize("theta", ["x", -1, 0, [], math.inf, math.nan, None, 10**400])
def test_theta(hf: Path, theta: object) -> None:
    assert "rope_theta" in refusal_of_config(hf, rope_parameters={"rope_type": "default", "rope_theta": theta})


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "5", '"x"', "\0", "{}", "[" * 10**5, '{"a":' * 10**5])
def test_an_invalid_config(hf: Path, text: str) -> None:
    (hf / "config.json").write_text(text)
    assert "config.json" in refusal_of(hf)


@pytest.mark.parametrize("damage", [Path.unlink, replace_by_folder, replace_by_loop, replace_by_dangling_link])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_or_link_in_place_of_a_file(hf: Path, damage: Callable[[Path], None], name: str) -> None:
    damage(hf / name)
    assert name in refusal_of(hf)


def rewrite_header(path: Path, change: Callable[[dict], object]) -> None:
    """Rewrite the header of a safetensors file and keep the rest."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    changed_header = change(json.loads(content[8 : 8 + length]))
    raw = changed_header if isinstance(changed_header, bytes) else json.dumps(changed_header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])


NORM = "model.norm.weight"
WRONG_FIELDS = [
    {"dtype": "F99"}, {"dtype": 5}, {"dtype": "I64"}, {"dtype": "F64"}, {"dtype": "F16"}, {"dtype": "BOOL"},
    {"shape": []}, {"shape": [-1, 2]}, {"shape": [2**40, 2**40]}, {"shape": "x"}, {"shape": [1.5]}, {"shape": [2**63]},
    {"data_offsets": [0, 10**15]}, {"data_offsets": [5, 1]}, {"data_offsets": [-1, 5]}, {"data_offsets": [0]},
    {"data_offsets": None},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_FIELDS, ids=str)
def test_a_header_with_a_wrong_field(hf: Path, wrong: dict, limited_memory: None) -> None:
    rewrite_header(hf / "model.safetensors", lambda tensors: tensors | {NORM: tensors[NORM] | wrong})
    assert "model.safetensors is not a whole safetensors file" in refusal_of(hf)


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"null", b"\xff" * 30, b"{" * 1000, b'{"__metadata__": 5}'])
def test_an_invalid_header(hf: Path, raw: bytes) -> None:
    rewrite_header(hf / "model.safetensors", lambda _: raw)
    assert "model.safetensors" in refusal_of(hf)


@pytest.mark.parametrize("length", [0, 1, 100, 2**32, 2**63, 2**64 - 1])
def test_a_wrong_header_length(hf: Path, length: int, limited_memory: None) -> None:
    path = hf / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    assert "model.safetensors is not a whole safetensors file" in refusal_of(hf)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -1])
def test_cut_short_or_too_long(hf: Path, length: int) -> None:
    path = hf / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    assert "model.safetensors is not a whole safetensors file" in refusal_of(hf)
    path.write_bytes(whole + bytes(length % 50 + 1))
    assert "model.safetensors is not a whole safetensors file" in refusal_of(hf)


EMBED, ROUTER = "model.embed_tokens.weight", "model.layers.1.mlp.router.gate.weight"
EXPERT = "model.layers.2.mlp.experts.2.down_proj.weight"


@pytest.mark.parametrize("name", [NORM, EMBED, ROUTER, EXPERT, "model.layers.1.mlp.expert_bias", "lm_head.weight"])
def test_tensors_that_do_not_fit(hf: Path, name: str) -> None:
    """Missing, renamed, of another shape, integer, or not in the config's model: the message names the tensor."""
    path = hf / "model.safetensors"
    tensors = load_file(path)
    original = tensors[name]
    others = [
        original[:-1],
        original.unsqueeze(0),
        original.flatten()[0],
        original.int(),
        original.bool(),
        original.to(torch.float8_e4m3fn),
    ]
    for tensor in [None, *others]:
        changed = {key: value for key, value in tensors.items() if key != name}
        changed |= {} if tensor is None else {name: tensor.contiguous()}
        save_file(changed, path)
        assert name in refusal_of(hf)
    save_file(tensors | {f"{name}.more": original.clone()}, path)
    assert f"{name}.more" in refusal_of(hf)


def refusal_of_index(hf: Path, files: object) -> str:
    """The error message for a folder with this index."""
    (hf / INDEX).write_text(files if isinstance(files, str) else json.dumps(files))
    return refusal_of(hf)


def test_a_wrong_index(hf: Path, tmp_path: Path) -> None:
    (hf / "model.safetensors").rename(hf / "one.safetensors")
    (tmp_path / "out.safetensors").write_bytes((hf / "one.safetensors").read_bytes())
    for text in ["", "{", "[]", "null", "{}", "[" * 10**5, "\0"]:
        assert INDEX in refusal_of_index(hf, text)
    for names in [None, 5, [], {}, "x"]:
        assert f"{INDEX} has no weight_map" in refusal_of_index(hf, {"weight_map": names})
    outside = [
        "../out.safetensors",
        str(tmp_path / "out.safetensors"),
        "",
        ".",
        "..",
        "./one.safetensors",
        "/etc/passwd",
    ]
    for name in [*outside, 5, None, ["one.safetensors"], "one.bin", "a/one.safetensors"]:
        assert "only names of safetensors files in the folder" in refusal_of_index(hf, {"weight_map": {NORM: name}}), (
            name
        )
    for name in ["two.safetensors", ".safetensors", "one\0.safetensors"]:
        assert "is missing or not a file" in refusal_of_index(hf, {"weight_map": {NORM: name}}), name
    assert "safetensors" in refusal_of_index(hf, {"weight_map": {NORM: "x" * 5000 + ".safetensors"}})
    (hf / "two.safetensors").write_bytes((hf / "one.safetensors").read_bytes())
    both = {NORM: "one.safetensors", EMBED: "two.safetensors"}
    assert "in two files" in refusal_of_index(hf, {"weight_map": both})
    (hf / "two.safetensors").unlink()
    (hf / "two.safetensors").symlink_to(tmp_path / "out.safetensors")
    assert "is a link out of the folder" in refusal_of_index(hf, {"weight_map": {NORM: "two.safetensors"}})
