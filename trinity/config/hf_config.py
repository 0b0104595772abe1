"""ModelConfig ↔ the config.json of a Hugging Face AfMoE folder.

Writing: the keys of transformers' AfmoeConfig, and those that only vLLM (score_func, route_norm, n_group, topk_group),
llama.cpp (route_norm: without it the conversion leaves the gates unnormalised) and mlx-lm (rope_theta) read.
Reading: a value that would make a different model from Trinity's is refused by name, never ignored.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from trinity.config.model import ZOO, ModelConfig
from trinity.errors import UserError
from trinity.io.json_files import read_json

if TYPE_CHECKING:
    import torch

LOCAL, GLOBAL = "sliding_attention", "full_attention"
MODEL_TYPE = "afmoe"
"""model_type of every Trinity model."""

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
"""Field of ModelConfig → key of config.json, where both hold the same number."""

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
"""Key of config.json → its value for every Trinity model. Read: the key may be missing."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_expert_groups": (1,),
    "num_limited_groups": (1,),
    "rope_scaling": ({"rope_type": "default"}, {"type": "default"}),
}
"""Key of config.json → the values that, like null, have no effect. Exports do not write these keys."""


def to_hf_config(
    config: ModelConfig, *, bos_id: int | None, eos_id: int | None, pad_id: int | None, dtype: torch.dtype
) -> dict[str, Any]:
    """The content of config.json for a model.

    Args:
        config: the model's sizes.
        bos_id, eos_id, pad_id: special tokens, None where the tokenizer has none.
        dtype: data type in which the matrices are stored.
    """
    return {
        "architectures": ["AfmoeForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": str(dtype).removeprefix("torch."),
        **{hf_key: getattr(config, field) for field, hf_key in SIZES.items()},
        **FIXED,
        "layer_types": _layer_types(config),
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "mup_enabled": True,
        "initializer_range": config.init_std,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }


def read_hf_config(folder: Path) -> ModelConfig:
    """The model's sizes from the config.json of a folder.

    Raises:
        UserError: the folder has no config.json, or the model is not a Trinity model.
    """
    raw = read_json(folder / "config.json", "fetch or export it again")
    if raw is None:
        raise UserError(
            f"{folder / 'config.json'} does not exist; give a folder written by transformers or by tools/export_hf.py"
        )
    try:
        return from_hf_config(raw)
    except UserError as error:  # it begins with "config.json: "
        raise UserError(f"{folder}/{error}") from None


def from_hf_config(raw: dict[str, Any]) -> ModelConfig:
    """The model's sizes from the content of a config.json; `name` is that of the zoo's model of these sizes, if any.

    Raises:
        UserError: naming the key that is missing, of the wrong type, or has a value that no Trinity model has.
    """
    _check_is_trinity(raw)
    kinds, present = get_type_hints(ModelConfig), _with_defaults(raw)
    sizes: dict[str, Any] = {field: _number(present, hf_key, kinds[field]) for field, hf_key in SIZES.items()}
    try:
        config = ModelConfig(**sizes, rope_theta=_rope_theta(raw))
    except UserError as error:
        raise UserError(f"config.json: {error}") from None
    if raw.get("layer_types") not in (None, _layer_types(config)):
        raise UserError(
            f"config.json: layer_types is not {GLOBAL} in every layer whose 1-based index is a multiple of "
            f"global_attn_every_n_layers={config.global_every} and {LOCAL} in the others; only that is supported"
        )
    return replace(config, name=zoo_name(config, config.name))


def _check_is_trinity(raw: dict[str, Any]) -> None:
    if raw.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"config.json: model_type={raw.get('model_type')!r} is not supported: a dense model or another MoE "
            f"architecture has no place for its weights here; give a folder of model_type={MODEL_TYPE!r}, such as a "
            "published Trinity model or an export of tools/export_hf.py"
        )
    if (quantization := raw.get("quantization_config")) is not None:
        raise UserError(
            f"config.json: quantization_config={quantization!r} is not supported: the weights are quantised; give the "
            "model in bfloat16, float16 or float32, or dequantise it with transformers and save_pretrained it"
        )
    wrong = {key: value for key, value in FIXED.items() if raw.get(key, value) != value}
    wrong |= {key: None for key, values in _NEUTRAL.items() if raw.get(key) not in (None, *values)}
    if raw.get("mup_enabled") is not True:  # transformers' default differs
        wrong["mup_enabled"] = True
    for key, value in wrong.items():
        raise UserError(f"config.json: {key}={raw.get(key)!r} is not supported; only {value!r} is")


def _layer_types(config: ModelConfig) -> list[str]:
    """The attention type of each layer, by transformers' names."""
    return [GLOBAL if config.is_global(layer) else LOCAL for layer in range(config.layers)]


def _with_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """Fill in the keys that may be missing for transformers too."""
    missing = {"global_attn_every_n_layers": 4, "num_key_value_heads": raw.get("num_attention_heads")}
    return missing | {key: value for key, value in raw.items() if value is not None or key not in missing}


def _number(raw: dict[str, Any], key: str, kind: type[int] | type[float]) -> float:
    """The number at `key`: an int where `kind` is int, else a float."""
    if key not in raw:
        raise UserError(f"config.json: {key} is missing; a folder written by transformers or by export_hf has it")
    value = raw[key]
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise UserError(f"config.json: {key}={value!r} is not a{'n integer' if kind is int else ' number'}")
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise UserError(f"config.json: {key} is a number of more than 64 bits; fetch or export the folder again")
    return kind(value)


def _rope_theta(raw: dict[str, Any]) -> float:
    """θ of RoPE, from rope_parameters or, in older folders, from the top level."""
    rope = raw.get("rope_parameters")
    if rope is None:
        return _number({"rope_theta": 10_000.0} | raw, "rope_theta", float)
    plain = isinstance(rope, dict) and rope.get("rope_type", "default") == "default"
    if not plain or set(rope) - {"rope_type", "rope_theta"}:
        raise UserError(f"config.json: rope_parameters={rope!r} is not supported; only plain RoPE with a rope_theta is")
    return _number({"rope_theta": raw.get("rope_theta", 10_000.0)} | rope, "rope_theta", float)


def zoo_name(config: ModelConfig, default: str) -> str:
    """The name of the zoo's model of these sizes, or `default` if the zoo has none."""
    same = (name for name, model in ZOO.items() if architecture(model) == architecture(config))
    return next(same, default)


def architecture(config: ModelConfig) -> dict[str, int | float]:
    """The fields that affect what the model computes: all but `name` and `max_positions`."""
    return {key: value for key, value in vars(config).items() if key not in ("name", "max_positions")}
