"""The single table of tensor names: tensors of a Hugging Face AfMoE folder ↔ parts of Trinity's parameters and buffers.

On disk every matrix is a tensor of its own: q, k, v and gate; gate and up; one of each per expert. In the model they
share tensors. Export and import both walk this table, in opposite directions. `expert_momentum` is not on disk: a
folder holds a model, not a run.
"""

from collections.abc import Iterator
from itertools import accumulate

from trinity.config.model import ModelConfig

Index = tuple[int | slice, ...]
"""An index into a parameter or buffer; it gives a view of the part that one tensor on disk holds."""

_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_mlp_layernorm",
    "ffn_post_norm": "post_mlp_layernorm",
}


def weight_map(config: ModelConfig) -> Iterator[tuple[str, str, Index]]:
    """(name on disk, name of the parameter or buffer, its part) for every tensor on disk."""
    yield "model.embed_tokens.weight", "embed.weight", ()
    for layer in range(config.layers):
        yield from _block(config, layer)
    yield "model.norm.weight", "norm.gain", ()
    yield "lm_head.weight", "head.weight", ()


def _block(config: ModelConfig, layer: int) -> Iterator[tuple[str, str, Index]]:
    hf_prefix, prefix = f"model.layers.{layer}", f"blocks.{layer}"
    for norm, hf_norm in _NORMS.items():
        yield f"{hf_prefix}.{hf_norm}.weight", f"{prefix}.{norm}.gain", ()
    q_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
    projections = {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width, "gate_proj": q_width}
    yield from _stacked(f"{hf_prefix}.self_attn", f"{prefix}.attention.qkvg.weight", projections)
    yield f"{hf_prefix}.self_attn.o_proj.weight", f"{prefix}.attention.out.weight", ()
    for norm in ("q_norm", "k_norm"):
        yield f"{hf_prefix}.self_attn.{norm}.weight", f"{prefix}.attention.{norm}.gain", ()
    if layer < config.dense_layers:
        yield from _swiglu(f"{hf_prefix}.mlp", f"{prefix}.ffn", config.dense_width)
        return
    yield f"{hf_prefix}.mlp.router.gate.weight", f"{prefix}.ffn.router.weight", ()
    yield f"{hf_prefix}.mlp.expert_bias", f"{prefix}.ffn.expert_bias", ()
    shared_width = config.shared_experts * config.expert_width
    yield from _swiglu(f"{hf_prefix}.mlp.shared_experts", f"{prefix}.ffn.shared", shared_width)
    for expert in range(config.experts):
        hf_expert = f"{hf_prefix}.mlp.experts.{expert}"
        for half, projection in enumerate(("gate_proj", "up_proj")):
            yield f"{hf_expert}.{projection}.weight", f"{prefix}.ffn.experts.gate_up", (expert, half)
        yield f"{hf_expert}.down_proj.weight", f"{prefix}.ffn.experts.down", (expert,)


def _swiglu(hf_prefix: str, prefix: str, width: int) -> Iterator[tuple[str, str, Index]]:
    yield from _stacked(hf_prefix, f"{prefix}.gate_up.weight", {"gate_proj": width, "up_proj": width})
    yield f"{hf_prefix}.down_proj.weight", f"{prefix}.down.weight", ()


def _stacked(hf_prefix: str, parameter: str, rows: dict[str, int]) -> Iterator[tuple[str, str, Index]]:
    """Matrices that are stacked by rows in one parameter; rows: name on disk → number of rows."""
    ends = list(accumulate(rows.values()))
    for name, count, end in zip(rows, rows.values(), ends):
        yield f"{hf_prefix}.{name}.weight", parameter, (slice(end - count, end),)
