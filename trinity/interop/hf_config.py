"""ModelConfig ↔ the config.json of a Hugging Face AfMoE folder.

Out: what transformers' AfmoeConfig holds, and the words that only vLLM (score_func, route_norm, n_group, topk_group),
llama.cpp (route_norm: without it the conversion leaves the gates unnormalised) and mlx-lm (rope_theta) read.
In: trinity.config.hf_sizes, because a config's sizes may come from such a folder.
"""

from typing import Any

import torch

from trinity.config.hf_sizes import FIXED, SIZES, architecture, layer_types, model_config
from trinity.config.model import ModelConfig

__all__ = ["architecture", "hf_config", "model_config"]


def hf_config(
    config: ModelConfig, *, bos_id: int | None, eos_id: int | None, pad_id: int | None, dtype: torch.dtype
) -> dict[str, Any]:
    """The config.json of a model.

    Args:
        config: the model's sizes.
        bos_id, eos_id, pad_id: special tokens, None where the tokenizer has none.
        dtype: what the matrices are stored in.
    """
    return {
        "architectures": ["AfmoeForCausalLM"],
        "model_type": "afmoe",
        "dtype": str(dtype).removeprefix("torch."),
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        **FIXED,
        "layer_types": layer_types(config),
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "mup_enabled": True,
        "initializer_range": config.init_std,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }
