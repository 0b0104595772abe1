"""config.json is written as transformers would write it; a config.json of another model is refused."""

from typing import Any

import pytest
import torch
from transformers import AfmoeConfig

from tests.interop.small_model import CONFIG
from trinity.config.hf_config import from_hf_config, to_hf_config
from trinity.errors import UserError
from trinity.models import ZOO, ModelConfig

CONFIGS = {
    **ZOO,
    "small": CONFIG,
    "nothing but local": ModelConfig(layers=3),
    "all global": ModelConfig(global_every=1),
}


def written_config(config: ModelConfig = CONFIG) -> dict[str, Any]:
    return to_hf_config(config, bos_id=0, eos_id=1, pad_id=2, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_directly_and_through_transformers(name: str) -> None:
    """Trinity reads its own config.json and the one that transformers makes from it."""
    config = CONFIGS[name]
    hf_config = AfmoeConfig.from_dict(written_config(config))
    assert from_hf_config(written_config(config)) == config
    assert from_hf_config(hf_config.to_dict()) == config
    assert hf_config.layer_types == [
        "full_attention" if config.is_global(i) else "sliding_attention" for i in range(config.layers)
    ]
    assert hf_config.rope_parameters == {"rope_type": "default", "rope_theta": config.rope_theta}
    assert (hf_config.bos_token_id, hf_config.eos_token_id, hf_config.pad_token_id) == (0, 1, 2)


def test_every_field_of_transformers_is_written() -> None:
    """A missing field would get a default that may change; output_router_logits affects only the returned values."""
    own_fields = set(AfmoeConfig().to_dict()) - set(AfmoeConfig.__base__().to_dict())
    assert own_fields - set(written_config()) == {"output_router_logits"}


def test_every_field_of_the_model_is_written() -> None:
    """Each field of ModelConfig but the name changes config.json."""
    for field, value in vars(CONFIG).items():
        if field in ("name", "heads"):
            continue
        other = {"kv_heads": 1, "global_every": 3}.get(field, value + 2)
        assert written_config(ModelConfig(**{**vars(CONFIG), field: other})) != written_config(), field
    assert written_config(ModelConfig(**{**vars(CONFIG), "heads": 8})) != written_config()


def test_keys_that_other_programs_need() -> None:
    """vLLM reads the first four without a default; llama.cpp leaves gates unnormalised without route_norm."""
    expected = {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1, "rope_theta": 500.0}
    assert expected.items() <= written_config().items()
    assert written_config()["architectures"] == ["AfmoeForCausalLM"]


OLDER = ("rope_parameters", "layer_types", "score_func", "route_norm", "n_group", "topk_group", "num_key_value_heads")


def test_older_folders() -> None:
    """Missing keys get transformers' defaults: θ at the top level, as many key heads as query heads."""
    raw = {key: value for key, value in written_config().items() if key not in OLDER}
    raw |= {"rope_scaling": None, "num_expert_groups": 1, "load_balance_coeff": 0.001}
    assert from_hf_config(raw) == ModelConfig(**{**vars(CONFIG), "kv_heads": CONFIG.heads})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"model_type": None}, "model_type=None"),
        ({"score_func": "softmax"}, "score_func='softmax'"),
        ({"route_norm": False}, "route_norm=False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"mup_enabled": False}, "mup_enabled=False"),
        ({"n_group": 2}, "n_group=2"),
        ({"num_limited_groups": 2}, "num_limited_groups=2"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
        ({"layer_types": ["full_attention"] * 5}, "layer_types"),
        ({"global_attn_every_n_layers": 2}, "layer_types"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling="),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}, "rope_parameters="),
        ({"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}}, "rope_parameters="),
        ({"rope_parameters": "default"}, "rope_parameters='default'"),
        ({"hidden_size": "24"}, "hidden_size='24'"),
        ({"hidden_size": True}, "hidden_size=True"),
        ({"route_scale": None}, "route_scale=None"),
        ({"num_attention_heads": 3}, "model.heads=3"),
    ],
)
def test_other_models_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=r"^config\.json: ") as caught:
        from_hf_config(written_config() | change)
    assert named in str(caught.value)


@pytest.mark.parametrize("key", ["model_type", "mup_enabled", "hidden_size", "num_dense_layers"])
def test_missing_keys_are_named(key: str) -> None:
    with pytest.raises(UserError, match=key):
        from_hf_config({name: value for name, value in written_config().items() if name != key})
