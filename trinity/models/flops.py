"""Parameters and FLOPs of a model, counted before anything runs; trinity.planning estimates the cost of a run.

Parameters are counted on the model itself, built without memory on the meta device. FLOPs follow from those counts and
from the number of tokens that each attention layer attends to.
"""

import torch

from trinity.config.model import ModelConfig
from trinity.models.param_roles import Role, parameter_roles
from trinity.models.trinity import Trinity


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Number of parameters by part of the model, in total, and active for one token.

    Returns:
        "embedding", "head", "attention", "dense FFN", "router", "routed experts", "shared experts", "norms" and
        "expert bias" (a buffer; the published counts include it), which add up to "total"; and "active": total without
        the routed experts that a token does not choose. Both include embedding and head in full.
    """
    with torch.device("meta"):
        model = Trinity(config)
    names = ("embedding", "head", "attention", "dense FFN", "router", "routed experts", "shared experts", "norms")
    counts = dict.fromkeys(names, 0)
    for role in parameter_roles(model):
        counts[_part(role)] += role.parameter.numel()
    counts["expert bias"] = sum(x.numel() for name, x in model.named_buffers() if name.endswith(".expert_bias"))
    total = sum(counts.values())
    idle = counts["routed experts"] // config.experts * (config.experts - config.active_experts)
    return counts | {"total": total, "active": total - idle}


def flops_per_token(config: ModelConfig, sequence_length: int) -> dict[str, float]:
    """FLOPs per token, averaged over a row of sequence_length tokens; a multiplication and an addition count 2.

    A matrix costs 2 per weight that the token uses. Softmax attention costs 4·h_q·d_h per key (QKᵀ and PV), with exact
    windows: token t, from 0, attends to min(t+1, w) tokens on a local layer and to t+1 on a global one. Not counted:
    the embedding (a look-up), norms, RoPE, activations, softmax, the optimizer, recompute. No document mask is assumed;
    with one, attention costs less.

    Returns:
        "attention projections", "attention core", "dense FFN", "router", "routed experts", "shared experts" and
        "head", which add up to "total", the forward pass; and "training", three times that, as in the usual MFU. Flash
        attention does more, because its backward recomputes the scores: 5 products against 2 in forward. With that,
        Nano, Mini and Large at their training lengths take 6.25, 21.4 and 93.7 GFLOP instead of 6.06, 21.0 and 91.3.
    """
    counts, S = parameter_counts(config), sequence_length
    keys_global = (S + 1) / 2
    w = min(config.window, S)
    keys_local = (w * (w + 1) / 2 + (S - w) * w) / S
    keys = sum(keys_global if config.is_global(layer) else keys_local for layer in range(config.layers))
    flops = {
        "attention projections": 2 * counts["attention"],
        "attention core": 4 * config.heads * config.head_dim * keys,
        "dense FFN": 2 * counts["dense FFN"],
        "router": 2 * counts["router"],
        "routed experts": 2 * counts["routed experts"] * config.active_experts / config.experts,
        "shared experts": 2 * counts["shared experts"],
        "head": 2 * counts["head"],
    }
    total = sum(flops.values())
    return flops | {"total": total, "training": 3 * total}


def _part(role: Role) -> str:
    if role.kind == "matrix":
        if ".attention." in role.name:
            return "attention"
        return "shared experts" if ".shared." in role.name else "dense FFN"
    return {"experts": "routed experts", "gain": "norms"}.get(role.kind, role.kind)
