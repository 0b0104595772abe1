"""What a model and a run cost before anything runs: parameters, FLOPs, tokens, bytes.

Parameters are counted on the model itself, built without memory on the meta device; FLOPs follow from those counts and
from how many tokens each attention layer sees. `describe` prints it all: the text under a dry run's config.
"""

from collections import defaultdict
from itertools import pairwise
from typing import NamedTuple

import torch

from trinity.config.model import ModelConfig
from trinity.config.run import RunConfig
from trinity.models.roles import Role, parameter_roles
from trinity.models.trinity import Trinity

GB = 1e9
"""Bytes are shown in units of 10⁹, as vendors count a GPU's memory."""


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """How many numbers the model holds, and how many of them one token uses.

    Returns:
        "embedding", "head", "attention", "dense FFN", "router", "routed experts", "shared experts", "norms" and
        "expert bias" (a buffer; the published counts include it), which add up to "total"; and "active": total without
        the routed experts that a token does not choose. Embedding and head count whole in both.
    """
    model = _on_meta(config)
    names = ("embedding", "head", "attention", "dense FFN", "router", "routed experts", "shared experts", "norms")
    counts = dict.fromkeys(names, 0)
    for role in parameter_roles(model):
        counts[_part(role)] += role.parameter.numel()
    counts["expert bias"] = sum(x.numel() for name, x in model.named_buffers() if name.endswith(".expert_bias"))
    total = sum(counts.values())
    idle = counts["routed experts"] // config.experts * (config.experts - config.active_experts)
    return counts | {"total": total, "active": total - idle}


def flops_per_token(config: ModelConfig, sequence_length: int) -> dict[str, float]:
    """FLOPs of one token, averaged over a row of sequence_length tokens; a multiplication and an addition are 2.

    A matrix costs 2 per weight that the token uses; softmax attention 4·h_q·d_h per token it sees (QKᵀ and PV), the
    windows counted exactly: token t, from 0, sees min(t+1, w) on a local layer and t+1 on a global one. Not counted:
    the embedding (a look-up), norms, RoPE, activations, softmax, the optimizer, what recompute repeats. A document mask
    is taken as absent: with it attention costs less.

    Returns:
        "attention projections", "attention core", "dense FFN", "router", "routed experts", "shared experts" and
        "head", which add up to "total", the forward pass; and "training", three times that, as MFU counts it. Flash
        attention does more: backward makes the scores again, 5 products to forward's 2. Counted in, Nano, Mini and
        Large at their training lengths take 6.25, 21.4 and 93.7 GFLOP in place of 6.06, 21.0 and 91.3.
    """
    counts, S = parameter_counts(config), sequence_length
    seen_by_global = (S + 1) / 2
    w = min(config.window, S)
    seen_by_local = (w * (w + 1) / 2 + (S - w) * w) / S
    seen = sum(seen_by_global if config.is_global(layer) else seen_by_local for layer in range(config.layers))
    flops = {
        "attention projections": 2 * counts["attention"],
        "attention core": 4 * config.heads * config.head_dim * seen,
        "dense FFN": 2 * counts["dense FFN"],
        "router": 2 * counts["router"],
        "routed experts": 2 * counts["routed experts"] * config.active_experts / config.experts,
        "shared experts": 2 * counts["shared experts"],
        "head": 2 * counts["head"],
    }
    total = sum(flops.values())
    return flops | {"total": total, "training": 3 * total}


class Stretch(NamedTuple):
    """Steps of one global batch size: the step and the token count they begin at, and how many they are."""

    step: int
    token: int
    sequences: int
    steps: int


def stretches(config: RunConfig) -> list[Stretch]:
    """The run, cut where its global batch grows: at the first step that begins at or after a ramp entry's tokens.

    The last stretch ends with the run: after run.steps, or with the step that reaches run.tokens.
    """
    batches = [(0, config.batch.sequences), *((entry.tokens, entry.sequences) for entry in config.batch.ramp)]
    step = token = 0
    found = []
    for (_, sequences), (following, _) in pairwise([*batches, (None, 0)]):
        per_step = sequences * config.data.sequence_length
        ends = [end for end in (following, config.run.tokens) if end is not None]
        limits = [max(0, -(-(end - token) // per_step)) for end in ends]  # rounded up
        if config.run.steps is not None:
            limits.append(config.run.steps - step)
        steps = min(limits)
        if steps:
            found.append(Stretch(step, token, sequences, steps))
        step, token = step + steps, token + steps * per_step
    return found


def static_memory(config: RunConfig, ranks: int) -> dict[str, float]:
    """Bytes that one rank holds whatever the microbatch, one copy of the model being sharded evenly over `ranks`.

    Parameters, gradients and optimizer state are fp32, or float64 where precision.compute is. Expert parallelism
    changes which part of the experts a rank keeps, not how much; replicas hold the same again.

    Returns:
        "parameters", "gradients", "Muon momentum" and "AdamW moments", which add up to "state". Beside it, weights
        gathered in precision.compute: "copy of the largest part" (block, embedding or head), where each is freed after
        use (twice that where the next is fetched meanwhile), and "copy of the whole model", where they are kept.
    """
    master = 8 if config.precision.compute == "float64" else 4
    kinds = {"matrix", "experts"} | ({"router"} if config.optim.router == "muon" else set())
    roles = parameter_roles(_on_meta(config.model))
    everything = sum(role.parameter.numel() for role in roles)
    muon = sum(role.parameter.numel() for role in roles if role.kind in kinds)
    state = {
        "parameters": master * everything / ranks,
        "gradients": master * everything / ranks,
        "Muon momentum": master * muon / ranks,
        "AdamW moments": 2 * master * (everything - muon) / ranks,
    }
    copies = _gathered(config, roles)
    return state | {
        "state": sum(state.values()),
        "copy of the largest part": max(copies.values()),
        "copy of the whole model": sum(copies.values()),
    }


def describe(config: RunConfig, processes: int = 1) -> str:
    """The cost of a run as aligned tables: parameters, FLOPs per token, length of the run, bytes per rank.

    Args:
        config: the resolved run.
        processes: of the launch; matters only where parallel.shard is −1.
    """
    counts = parameter_counts(config.model)
    flops = flops_per_token(config.model, config.data.sequence_length)
    ranks = _copy_ranks(config, processes)
    parameters = [(name, f"{count:,}", f"{count / counts['total']:.1%}") for name, count in counts.items()]
    work = [(name, f"{value / 1e9:,.3f}", f"{value / flops['total']:.0%}") for name, value in flops.items()]
    memory = [(name, f"{value / GB:,.2f}") for name, value in static_memory(config, ranks).items()]
    tables = [
        _table([("parameters", "number", "of total"), *parameters]),
        _table([(f"GFLOP per token, rows of {config.data.sequence_length}", "", "of total"), *work]),
        _table(_length_rows(config)),
        _table([(f"GB per rank, a copy of the model on {ranks} rank{'s' * (ranks > 1)}", ""), *memory])
        + "\nactivations and the peak of the loss and the optimizer's step come on top",
    ]
    return "\n\n".join(tables)


def _on_meta(config: ModelConfig) -> Trinity:
    with torch.device("meta"):
        return Trinity(config)


def _part(role: Role) -> str:
    if role.kind == "matrix":
        if ".attention." in role.name:
            return "attention"
        return "shared experts" if ".shared." in role.name else "dense FFN"
    return {"experts": "routed experts", "gain": "norms"}.get(role.kind, role.kind)


def _gathered(config: RunConfig, roles: list[Role]) -> dict[str, float]:
    """Bytes of each block, embedding and head in precision.compute, with only this rank's share of the experts."""
    size = {"bfloat16": 2, "float32": 4, "float64": 8}[config.precision.compute]
    copies: dict[str, float] = defaultdict(float)
    for role in roles:
        group = ".".join(role.name.split(".")[:2]) if role.name.startswith("blocks.") else role.name
        share = config.parallel.expert if role.kind == "experts" else 1
        copies[group] += size * role.parameter.numel() / share
    return copies


def _copy_ranks(config: RunConfig, processes: int) -> int:
    parallel = config.parallel
    if parallel.shard > 0:
        return parallel.shard * parallel.context
    return max(1, processes // parallel.replicate)


def _length_rows(config: RunConfig) -> list[tuple[str, ...]]:
    rows = [("length of the run", "steps", "sequences per step", "tokens per step", "tokens")]
    found = stretches(config)
    for stretch in found:
        per_step = stretch.sequences * config.data.sequence_length
        cells = (stretch.steps, stretch.sequences, per_step, stretch.steps * per_step)
        rows.append((f"from step {stretch.step:,}", *(f"{cell:,}" for cell in cells)))
    tokens = sum(stretch.steps * stretch.sequences for stretch in found) * config.data.sequence_length
    rows.append(("in all", f"{sum(stretch.steps for stretch in found):,}", "", "", f"{tokens:,}"))
    return rows


def _table(rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell, the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join(lines)
