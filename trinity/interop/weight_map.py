"""Which tensor of a Hugging Face AfMoE folder is which part of which of our parameters and buffers.

On disk every matrix stands alone: q, k, v and gate; gate and up; one of each per expert. Here they share tensors. This
table is the only place that knows both; export and import walk it in opposite directions. `expert_momentum` has no
place on disk: a folder holds a model, not a run.
"""

from collections.abc import Iterator
from itertools import accumulate

from trinity.config.model import ModelConfig

Index = tuple[int | slice, ...]
"""An index into our tensor that gives a view: the part that one tensor on disk holds."""

_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_mlp_layernorm",
    "ffn_post_norm": "post_mlp_layernorm",
}


def correspondence(config: ModelConfig) -> Iterator[tuple[str, str, Index]]:
    """Every tensor on disk: (its name there, our parameter's or buffer's name, the part of ours that it is)."""
    yield "model.embed_tokens.weight", "embed.weight", ()
    for layer in range(config.layers):
        yield from _block(config, layer)
    yield "model.norm.weight", "norm.gain", ()
    yield "lm_head.weight", "head.weight", ()


def _block(config: ModelConfig, layer: int) -> Iterator[tuple[str, str, Index]]:
    theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
    for our_norm, their_norm in _NORMS.items():
        yield f"{theirs}.{their_norm}.weight", f"{ours}.{our_norm}.gain", ()
    q_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
    projections = {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width, "gate_proj": q_width}
    yield from _stacked(f"{theirs}.self_attn", f"{ours}.attention.qkvg.weight", projections)
    yield f"{theirs}.self_attn.o_proj.weight", f"{ours}.attention.out.weight", ()
    for norm in ("q_norm", "k_norm"):
        yield f"{theirs}.self_attn.{norm}.weight", f"{ours}.attention.{norm}.gain", ()
    if layer < config.dense_layers:
        yield from _swiglu(f"{theirs}.mlp", f"{ours}.ffn", config.dense_width)
        return
    yield f"{theirs}.mlp.router.gate.weight", f"{ours}.ffn.router.weight", ()
    yield f"{theirs}.mlp.expert_bias", f"{ours}.ffn.expert_bias", ()
    shared_width = config.shared_experts * config.expert_width
    yield from _swiglu(f"{theirs}.mlp.shared_experts", f"{ours}.ffn.shared", shared_width)
    for expert in range(config.experts):
        for half, projection in enumerate(("gate_proj", "up_proj")):
            yield f"{theirs}.mlp.experts.{expert}.{projection}.weight", f"{ours}.ffn.experts.gate_up", (expert, half)
        yield f"{theirs}.mlp.experts.{expert}.down_proj.weight", f"{ours}.ffn.experts.down", (expert,)


def _swiglu(theirs: str, ours: str, hidden: int) -> Iterator[tuple[str, str, Index]]:
    yield from _stacked(theirs, f"{ours}.gate_up.weight", {"gate_proj": hidden, "up_proj": hidden})
    yield f"{theirs}.down_proj.weight", f"{ours}.down.weight", ()


def _stacked(theirs: str, ours: str, rows: dict[str, int]) -> Iterator[tuple[str, str, Index]]:
    ends = list(accumulate(rows.values()))
    for name, count, end in zip(rows, rows.values(), ends):
        yield f"{theirs}.{name}.weight", ours, (slice(end - count, end),)
