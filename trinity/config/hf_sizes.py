"""The sizes that the config.json of a Hugging Face AfMoE folder describes.

The fields that transformers' AfmoeConfig holds. What would make another model than Trinity's is refused by name, never
passed over. The other direction is trinity.interop.hf_config.
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from trinity.config.model import ZOO, ModelConfig
from trinity.errors import UserError
from trinity.io.json_files import read_json

LOCAL, GLOBAL = "sliding_attention", "full_attention"

SIZES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "dense_layers": "num_dense_layers",
    "dense_width": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "window": "sliding_window",
    "global_every": "global_attn_every_n_layers",
    "experts": "num_experts",
    "active_experts": "num_experts_per_tok",
    "shared_experts": "num_shared_experts",
    "expert_width": "moe_intermediate_size",
    "route_scale": "route_scale",
    "norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
}
"""Field of ModelConfig → their key, where both hold the same number."""

FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "score_func": "sigmoid",
    "route_norm": True,
    "n_group": 1,
    "topk_group": 1,
}
"""Their key → what it says of every Trinity model; a folder may leave the key out."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_expert_groups": (1,),
    "num_limited_groups": (1,),
    "rope_scaling": ({"rope_type": "default"}, {"type": "default"}),
    "quantization_config": (),
}
"""Their key → the values that change nothing beside null; exports do not write it."""


def hf_sizes(folder: Path) -> ModelConfig:
    """The sizes of a folder's model.

    Raises:
        UserError: it has no config.json, or one of another model.
    """
    raw = read_json(folder / "config.json", "fetch or export it again")
    if raw is None:
        raise UserError(
            f"{folder / 'config.json'} does not exist; give a folder written by transformers or by tools/export_hf.py"
        )
    return model_config(raw)


def model_config(raw: dict[str, Any]) -> ModelConfig:
    """The sizes that a config.json describes; `name` is the zoo's where the sizes are.

    Raises:
        UserError: naming the key that is missing, of the wrong type, or says something that no Trinity model is.
    """
    _refuse_other_models(raw)
    kinds = {field.name: field.type for field in fields(ModelConfig)}
    sizes = {name: _number(_with_defaults(raw), theirs, kinds[name]) for name, theirs in SIZES.items()}
    try:
        config = ModelConfig(**sizes, rope_theta=_rope_theta(raw))
    except UserError as error:
        raise UserError(f"config.json: {error}") from None
    if raw.get("layer_types") not in (None, layer_types(config)):
        raise UserError(
            f"config.json: layer_types is not {GLOBAL} in every layer whose 1-based index is a multiple of "
            f"global_attn_every_n_layers={config.global_every} and {LOCAL} in the others; only that is supported"
        )
    return replace(config, name=zoo_name(config, config.name))


def _refuse_other_models(raw: dict[str, Any]) -> None:
    wrong = {key: value for key, value in FIXED.items() if raw.get(key, value) != value}
    wrong |= {key: None for key, values in _NEUTRAL.items() if raw.get(key) not in (None, *values)}
    for key, value in {"model_type": "afmoe", "mup_enabled": True}.items():  # transformers' defaults differ
        if raw.get(key) != value:
            wrong[key] = value
    for key, value in wrong.items():
        raise UserError(f"config.json: {key}={raw.get(key)!r} is not supported; only {value!r} is")


def layer_types(config: ModelConfig) -> list[str]:
    """The kind of attention of each layer, in transformers' words."""
    return [GLOBAL if config.is_global(layer) else LOCAL for layer in range(config.layers)]


def _with_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """The keys that transformers too lets a folder leave out."""
    missing = {"global_attn_every_n_layers": 4, "num_key_value_heads": raw.get("num_attention_heads")}
    return missing | {key: value for key, value in raw.items() if value is not None or key not in missing}


def _number(raw: dict[str, Any], key: str, kind: type) -> int | float:
    if key not in raw:
        raise UserError(f"config.json: {key} is missing; a folder written by transformers or by export_hf has it")
    value = raw[key]
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise UserError(f"config.json: {key}={value!r} is not a{'n integer' if kind is int else ' number'}")
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise UserError(f"config.json: {key} is a number of more than 64 bits; fetch or export the folder again")
    return kind(value)


def _rope_theta(raw: dict[str, Any]) -> float:
    """θ from rope_parameters, else from the top level, where older folders have it."""
    rope = raw.get("rope_parameters")
    if rope is None:
        return _number({"rope_theta": 10_000.0} | raw, "rope_theta", float)
    plain = isinstance(rope, dict) and rope.get("rope_type", "default") == "default"
    if not plain or set(rope) - {"rope_type", "rope_theta"}:
        raise UserError(f"config.json: rope_parameters={rope!r} is not supported; only plain RoPE with a rope_theta is")
    return _number({"rope_theta": raw.get("rope_theta", 10_000.0)} | rope, "rope_theta", float)


def zoo_name(config: ModelConfig, otherwise: str) -> str:
    """The name of the zoo's model of these sizes, or another where there is none."""
    same = (name for name, known in ZOO.items() if architecture(known) == architecture(config))
    return next(same, otherwise)


def architecture(config: ModelConfig) -> dict[str, int | float]:
    """The fields that decide what the model computes: all but its name and the positions that it promises."""
    return {key: value for key, value in vars(config).items() if key not in ("name", "max_positions")}
