"""Hugging Face folders whose config.json, index or safetensors lie."""

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.malformed.refusals import become_dangling, become_folder, become_loop, refusal
from trinity.interop import load_hf

INDEX = "model.safetensors.index.json"
SIZES = [
    "vocab_size", "hidden_size", "num_hidden_layers", "num_dense_layers", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "sliding_window", "global_attn_every_n_layers", "num_experts",
    "num_experts_per_tok", "num_shared_experts", "moe_intermediate_size", "max_position_embeddings",
]  # fmt: skip
NUMBERS = ["route_scale", "rms_norm_eps"]
OURS = {
    "hidden_size": "model.width", "num_hidden_layers": "model.layers", "num_dense_layers": "model.dense_layers",
    "intermediate_size": "model.dense_width", "num_attention_heads": "model.heads", "route_scale": "model.route_scale",
    "num_key_value_heads": "model.kv_heads", "sliding_window": "model.window", "rms_norm_eps": "model.norm_eps",
    "global_attn_every_n_layers": "model.global_every", "num_experts": "model.experts",
    "num_experts_per_tok": "model.active_experts", "num_shared_experts": "model.shared_experts",
    "moe_intermediate_size": "model.expert_width", "max_position_embeddings": "model.max_positions",
    "vocab_size": "model.vocab_size", "head_dim": "model.head_dim",
}  # fmt: skip
"""Their key → ours, which says that a number is too small or too large."""
FIXED = {
    "model_type": ["llama", None, 5, []], "hidden_act": ["gelu", 5], "attention_bias": [True, "no"],
    "attention_dropout": [0.1, math.nan], "tie_word_embeddings": [True], "score_func": ["softmax"],
    "route_norm": [False], "n_group": [2, "1"], "topk_group": [2], "num_expert_groups": [2], "num_limited_groups": [2],
    "mup_enabled": [False, None], "rope_scaling": [{"rope_type": "yarn"}, 5], "quantization_config": [{}, {"bits": 4}],
    "rope_parameters": [[], "x", {"rope_type": "yarn"}, {"factor": 2}],
    "layer_types": [[], "x", {}, ["sliding_attention"], [None] * 4, ["full_attention"] * 4],
}  # fmt: skip
"""Their key → values that would make another model."""


def refused(hf: Path) -> str:
    """The sentence with which the folder is refused."""
    return refusal(lambda: load_hf(hf), hf)


def configured(hf: Path, **values: Any) -> str:
    """The sentence about a config.json with other values."""
    path = hf / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | values))
    sentence = refused(hf)
    path.write_text(json.dumps(raw))
    return sentence


@pytest.mark.parametrize("key", [*SIZES, *NUMBERS])
def test_a_number_of_the_config(hf: Path, key: str, little_memory: None) -> None:
    """Of another type, not finite, 0, negative, of 400 digits: each names the key, theirs or ours."""
    for value in ["word", [], {}, True, math.nan, math.inf, -1, 10**400, *([1.5, 1e308] if key in SIZES else [])]:
        sentence = configured(hf, **{key: value})
        assert key in sentence or OURS[key] in sentence, value
    if key != "num_dense_layers":
        assert f"{OURS[key]}=0" in configured(hf, **{key: 0})
    if key not in (
        "global_attn_every_n_layers",
        "num_key_value_heads",
    ):  # which transformers too lets a folder leave out
        assert key in configured(hf, **{key: None})


@pytest.mark.parametrize("size", [10**6, 10**12, 2**60, 2**62])
@pytest.mark.parametrize("key", [key for key in SIZES if key not in ("sliding_window", "max_position_embeddings")])
def test_enormous_sizes(hf: Path, key: str, size: int, little_memory: None) -> None:
    """Refused before memory is taken: by the names or shapes of the tensors, or as larger than any machine holds."""
    if key != "global_attn_every_n_layers":
        configured(hf, **{key: size})
    configured(hf, **{key: size + 1, "layer_types": None, "num_hidden_layers": size})


@pytest.mark.parametrize("key", FIXED)
def test_another_model(hf: Path, key: str) -> None:
    for value in FIXED[key]:
        assert f"config.json: {key}" in configured(hf, **{key: value}), value


@pytest.mark.parametrize("theta", ["x", -1, 0, [], math.inf, math.nan, None, 10**400])
def test_theta(hf: Path, theta: object) -> None:
    assert "rope_theta" in configured(hf, rope_parameters={"rope_type": "default", "rope_theta": theta})


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "5", '"x"', "\0", "{}", "[" * 10**5, '{"a":' * 10**5])
def test_a_config_that_is_none(hf: Path, text: str) -> None:
    (hf / "config.json").write_text(text)
    assert "config.json" in refused(hf)


@pytest.mark.parametrize("harm", [Path.unlink, become_folder, become_loop, become_dangling])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_something_else_than_a_file(hf: Path, harm: Callable[[Path], None], name: str) -> None:
    harm(hf / name)
    assert name in refused(hf)


def header(path: Path, change: Callable[[dict], object]) -> None:
    """Rewrite the header of a safetensors file; what follows it stays."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    made = change(json.loads(content[8 : 8 + length]))
    raw = made if isinstance(made, bytes) else json.dumps(made).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])


NORM = "model.norm.weight"
LIES = [
    {"dtype": "F99"}, {"dtype": 5}, {"dtype": "I64"}, {"dtype": "F64"}, {"dtype": "F16"}, {"dtype": "BOOL"},
    {"shape": []}, {"shape": [-1, 2]}, {"shape": [2**40, 2**40]}, {"shape": "x"}, {"shape": [1.5]}, {"shape": [2**63]},
    {"data_offsets": [0, 10**15]}, {"data_offsets": [5, 1]}, {"data_offsets": [-1, 5]}, {"data_offsets": [0]},
    {"data_offsets": None},
]  # fmt: skip


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_a_header_that_lies(hf: Path, lie: dict, little_memory: None) -> None:
    header(hf / "model.safetensors", lambda tensors: tensors | {NORM: tensors[NORM] | lie})
    assert "model.safetensors is not a whole safetensors file" in refused(hf)


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"null", b"\xff" * 30, b"{" * 1000, b'{"__metadata__": 5}'])
def test_a_header_that_is_none(hf: Path, raw: bytes) -> None:
    header(hf / "model.safetensors", lambda _: raw)
    assert "model.safetensors" in refused(hf)


@pytest.mark.parametrize("length", [0, 1, 100, 2**32, 2**63, 2**64 - 1])
def test_a_length_that_lies(hf: Path, length: int, little_memory: None) -> None:
    path = hf / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    assert "model.safetensors is not a whole safetensors file" in refused(hf)


@pytest.mark.parametrize("left", [0, 1, 7, 8, 9, 100, -1])
def test_cut_short_or_too_long(hf: Path, left: int) -> None:
    path = hf / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:left])
    assert "model.safetensors is not a whole safetensors file" in refused(hf)
    path.write_bytes(whole + bytes(left % 50 + 1))
    assert "model.safetensors is not a whole safetensors file" in refused(hf)


EMBED, ROUTER = "model.embed_tokens.weight", "model.layers.1.mlp.router.gate.weight"
EXPERT = "model.layers.2.mlp.experts.2.down_proj.weight"


@pytest.mark.parametrize("name", [NORM, EMBED, ROUTER, EXPERT, "model.layers.1.mlp.expert_bias", "lm_head.weight"])
def test_tensors_that_do_not_fit(hf: Path, name: str) -> None:
    """Missing, renamed, of another shape, integer, or one more than the config has a place for: each named."""
    path = hf / "model.safetensors"
    tensors = load_file(path)
    mine = tensors[name]
    others = [mine[:-1], mine.unsqueeze(0), mine.flatten()[0], mine.int(), mine.bool(), mine.to(torch.float8_e4m3fn)]
    for tensor in [None, *others]:
        changed = {key: value for key, value in tensors.items() if key != name}
        changed |= {} if tensor is None else {name: tensor.contiguous()}
        save_file(changed, path)
        assert name in refused(hf)
    save_file(tensors | {f"{name}.more": mine.clone()}, path)
    assert f"{name}.more" in refused(hf)


def indexed(hf: Path, files: object) -> str:
    """The sentence about a folder whose index says which files there are."""
    (hf / INDEX).write_text(files if isinstance(files, str) else json.dumps(files))
    return refused(hf)


def test_an_index_that_lies(hf: Path, tmp_path: Path) -> None:
    (hf / "model.safetensors").rename(hf / "one.safetensors")
    (tmp_path / "out.safetensors").write_bytes((hf / "one.safetensors").read_bytes())
    for text in ["", "{", "[]", "null", "{}", "[" * 10**5, "\0"]:
        assert INDEX in indexed(hf, text)
    for names in [None, 5, [], {}, "x"]:
        assert f"{INDEX} has no weight_map" in indexed(hf, {"weight_map": names})
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
        assert "only names of safetensors files in the folder" in indexed(hf, {"weight_map": {NORM: name}}), name
    for name in ["two.safetensors", ".safetensors", "one\0.safetensors"]:
        assert "is missing or not a file" in indexed(hf, {"weight_map": {NORM: name}}), name
    assert "safetensors" in indexed(hf, {"weight_map": {NORM: "x" * 5000 + ".safetensors"}})
    (hf / "two.safetensors").write_bytes((hf / "one.safetensors").read_bytes())
    both = {NORM: "one.safetensors", EMBED: "two.safetensors"}
    assert "in two files" in indexed(hf, {"weight_map": both})
    (hf / "two.safetensors").unlink()
    (hf / "two.safetensors").symlink_to(tmp_path / "out.safetensors")
    assert "is a link out of the folder" in indexed(hf, {"weight_map": {NORM: "two.safetensors"}})
