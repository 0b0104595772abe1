"""The tensors of an AfMoE folder by name: shape and kind, for one layer or for a whole model.

The same names as trinity/interop/weight_map.py, with shapes, and by layer, so that a layer of one model may become
another layer of the merged one. Every expert's matrices are tensors of their own.

Shapes: V vocabulary, D model width, E experts, F width of an expert or FFN, H and G query and key/value heads, C width
of a head.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from trinity.config.model import ModelConfig

EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_FUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)")


class Described(NamedTuple):
    """One tensor: name (in a layer: what follows `model.layers.N.`), shape, and kind.

    kind: "matrix", "gain", "router" or "expert_bias"; all but matrices are stored in fp32.
    """

    name: str
    shape: tuple[int, ...]
    kind: str


def layer_tensors(config: ModelConfig, dense: bool) -> Iterator[Described]:
    """The tensors of one layer with a dense FFN or an MoE layer; experts last, all gates and ups before the downs."""
    d, c = config.width, config.head_dim
    for norm in ("input", "post_attention", "pre_mlp", "post_mlp"):
        yield Described(f"{norm}_layernorm.weight", (d,), "gain")
    for name, heads in {"q": config.heads, "k": config.kv_heads, "v": config.kv_heads, "gate": config.heads}.items():
        yield Described(f"self_attn.{name}_proj.weight", (heads * c, d), "matrix")
    yield Described("self_attn.o_proj.weight", (d, config.heads * c), "matrix")
    for norm in ("q_norm", "k_norm"):
        yield Described(f"self_attn.{norm}.weight", (c,), "gain")
    if dense:
        yield from _swiglu("mlp", config.dense_width, d)
        return
    yield Described("mlp.router.gate.weight", (config.experts, d), "router")
    yield Described("mlp.expert_bias", (config.experts,), "expert_bias")
    yield from _swiglu("mlp.shared_experts", config.shared_experts * config.expert_width, d)
    for expert in range(config.experts):
        for name in ("gate_proj", "up_proj"):
            yield Described(f"mlp.experts.{expert}.{name}.weight", (config.expert_width, d), "matrix")
    for expert in range(config.experts):
        yield Described(f"mlp.experts.{expert}.down_proj.weight", (d, config.expert_width), "matrix")


def model_tensors(config: ModelConfig) -> Iterator[Described]:
    """All tensors of a model, by their whole names, in the order in which merged folders are written."""
    yield Described(EMBED, (config.vocab_size, config.width), "matrix")
    for layer in range(config.layers):
        for described in layer_tensors(config, layer < config.dense_layers):
            yield described._replace(name=layer_name(layer, described.name))
    yield Described(NORM, (config.width,), "gain")
    yield Described(HEAD, (config.vocab_size, config.width), "matrix")


def layer_name(layer: int, name: str) -> str:
    """The whole name of a layer's tensor."""
    return f"model.layers.{layer}.{name}"


def fused_parts(name: str, shape: tuple[int, ...]) -> list[tuple[str, int, int]] | None:
    """The experts' matrices in a stack `experts.gate_up_proj` [E, 2F, D] or `experts.down_proj` [E, D, F].

    Returns:
        (name of the matrix, its first row, its number of rows), rows counted over the stack seen as [E·rows, columns];
        None for a tensor that is no such stack, such as one whose gates and ups are not equally many.
    """
    match = _FUSED.fullmatch(name)
    if match is None or len(shape) != 3:
        return None
    prefix, kind = match.groups()
    experts, rows = shape[:2]
    if kind == "gate_up_proj" and rows % 2:
        return None
    if kind == "down_proj":
        return [(f"{prefix}.{expert}.down_proj.weight", expert * rows, rows) for expert in range(experts)]
    half = rows // 2
    return [
        (f"{prefix}.{expert}.{part}_proj.weight", expert * rows + number * half, half)
        for expert in range(experts)
        for number, part in enumerate(("gate", "up"))
    ]


def _swiglu(prefix: str, width: int, d: int) -> Iterator[Described]:
    for name in ("gate_proj", "up_proj"):
        yield Described(f"{prefix}.{name}.weight", (width, d), "matrix")
    yield Described(f"{prefix}.down_proj.weight", (d, width), "matrix")
