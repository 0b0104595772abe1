"""Estimate communication per step: one rank's collectives by purpose, their bytes and seconds.

    passes     FSDP gathers each group of weights in forward, and again in backward if it was freed, every microbatch;
               gradients are reduce-scattered every microbatch or once a step (parallel.defer_reduce), and all-reduced
               over the replicas once a step
    exchange   tokens to their experts and outputs back, and their gradients; with context parallelism keys and values
               of neighbours, or heads, and the counts of whole rows (activations.py)
    update     Muon's matrices to their owner ranks and back, and results among replicas, from the optimizer's layout;
               the step's metrics, some kilobytes

Calls and bytes are counted as in trinity.parallel.comm_counter: the full size of a collective on this rank. On the wire
it sends (n − 1)/n of that in groups of n, an all-reduce twice. A group with k ranks in a node has k network cards.
"""

from collections.abc import Sequence
from typing import NamedTuple

from trinity.config.run import RunConfig
from trinity.hardware import GPU
from trinity.optim.muon import Muon
from trinity.optim.muon_comm import sharing_pays
from trinity.optim.muon_layout import MatrixBatch
from trinity.parallel.comm_counter import Traffic
from trinity.parallel.mesh import Sizes
from trinity.planning.activations import ContextTraffic
from trinity.planning.fake_rank import FakeRank, FsdpGroup
from trinity.planning.schedule_segments import RankLoad


class Flow(NamedTuple):
    """The collectives of one kind and purpose in one step of one rank.

    phase: "passes" (overlaps with forward and backward), "exchange" (inside them) or "update" (the optimizers' step).
    kind: "all_gather", "reduce_scatter", "all_reduce" or "all_to_all".
    along: the mesh dimension, `ranks` ranks that are `stride` apart in rank order; "world" is all ranks.
    calls, bytes: counted as in trinity.parallel.comm_counter.
    """

    phase: str
    purpose: str
    kind: str
    along: str
    ranks: int
    stride: int
    calls: int
    bytes: float


def communication_flows(
    config: RunConfig,
    rank: FakeRank,
    load: RankLoad,
    exchanges: list[Traffic],
    defer: bool,
    contexts: Sequence[ContextTraffic] = (),
) -> list[Flow]:
    """All collectives of rank 0 in a step, summed by purpose.

    Args:
        load: the rank's share of the step.
        exchanges: each block's expert exchange for one microbatch.
        defer: whether gradients are reduced once a step.
        contexts: of each block, for one microbatch; empty without context parallelism.
    """
    sizes = rank.ranks.sizes
    exchange_calls, exchange_bytes = (load.microbatches * sum(column) for column in zip(*exchanges))
    entries = [
        *_weight_gathers(rank.groups, load.microbatches),
        *_gradient_reductions(rank.groups, 1 if defer else load.microbatches),
        ("exchange", "tokens to experts and back", "all_to_all", "expert", exchange_calls, exchange_bytes),
        *_context(contexts, load.microbatches),
        *_muon(rank.optimizers.muon, sizes),
        *_step_metrics(config, sizes, load),
    ]
    sums: dict[tuple[str, str, str, str], tuple[int, float]] = {}
    for phase, purpose, kind, along, calls, size in entries:
        before = sums.get((phase, purpose, kind, along), (0, 0))
        sums[phase, purpose, kind, along] = before[0] + calls, before[1] + size
    dimensions = _mesh_dimensions(sizes)
    flows = [
        Flow(phase, purpose, kind, along, *dimensions[along], *total)
        for (phase, purpose, kind, along), total in sums.items()
    ]
    return [flow for flow in flows if flow.ranks > 1 and flow.calls]


def flow_seconds(flow: Flow, gpu: GPU, achieved: float) -> float:
    """Seconds of a flow that has the links to itself.

    An all-to-all sends directly to each target. The others use rings that enter and leave a node once, so the network
    cards of all members in a node share the work.

    Args:
        achieved: share of the links' rates that is reached.
    """
    in_node = max(1, min(flow.ranks, gpu.per_node // flow.stride))
    if flow.kind == "all_to_all":
        to_each = flow.bytes / flow.ranks
        return max((in_node - 1) * to_each / gpu.node_link, (flow.ranks - in_node) * to_each / gpu.network) / achieved
    wire = flow.bytes * (flow.ranks - 1) / flow.ranks * (2 if flow.kind == "all_reduce" else 1)
    rate = gpu.node_link if in_node == flow.ranks else min(gpu.node_link, in_node * gpu.network)
    return wire / rate / achieved


def matrices_per_rank(muon: Muon, batch: MatrixBatch, replicas: int) -> tuple[int, bool]:
    """Number of matrices of a batch that this rank orthogonalizes, and whether replicas share them on GPUs."""
    matrices = batch.owned
    if batch.replicas is None or muon.share == "off" or matrices < 2:
        return matrices, False
    pays = sharing_pays(matrices, batch.shape, muon.steps, replicas, muon.wire, "cuda")
    return matrices, muon.share == "on" or pays


_FlowEntry = tuple[str, str, str, str, int, float]
"""A Flow without ranks and stride: phase, purpose, kind, along, calls, bytes."""


def _mesh_dimensions(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Ranks and stride of each mesh dimension."""
    return {
        "shard": (sizes.shard, 1),
        "expert": (sizes.expert, 1),
        "expert_shard": (sizes.expert_shard, sizes.expert),
        "context": (sizes.context, 1),
        "replicate": (sizes.replicate, sizes.shard),
        "world": (sizes.replicate * sizes.shard, 1),
    }


def _by_mesh_dimension(groups: list[FsdpGroup]) -> list[tuple[str, str, list[FsdpGroup]]]:
    """Name, mesh dimension and groups: of the dense parameters, then of the experts."""
    experts = [group for group in groups if group.kind == "experts"]
    dense = [group for group in groups if group.kind != "experts"]
    return [("dense", "shard", dense), ("experts", "expert_shard", experts)]


def _weight_gathers(groups: list[FsdpGroup], microbatches: int) -> list[_FlowEntry]:
    """FSDP's all-gathers, in each pass of a microbatch for which the weights are not gathered already."""
    entries: list[_FlowEntry] = []
    for name, along, members in _by_mesh_dimension(groups):
        calls = microbatches * sum(group.gathers for group in members)
        size = microbatches * sum(group.gathers * group.gathered for group in members)
        entries.append(("passes", f"weights, {name}", "all_gather", along, calls, size))
    return entries


def _gradient_reductions(groups: list[FsdpGroup], times: int) -> list[_FlowEntry]:
    """Reduce-scatter of the gradients `times` times a step, and all-reduce of the shards over the replicas once."""
    entries: list[_FlowEntry] = []
    for name, along, members in _by_mesh_dimension([group for group in groups if group.reduced]):
        size, shards = sum(group.reduced for group in members), sum(group.reduced // group.shards for group in members)
        entries.append(("passes", f"gradients, {name}", "reduce_scatter", along, times * len(members), times * size))
        entries.append(("passes", f"copies, {name}", "all_reduce", "replicate", len(members), shards))
    return entries


_CONTEXT_PURPOSES = {
    "halo": "keys and values of neighbours",
    "heads": "rows of some heads and back",
    "gather": "keys and values of all before",
}


def _context(contexts: Sequence[ContextTraffic], microbatches: int) -> list[_FlowEntry]:
    """Context parallelism: all-to-alls of each kind of layer, and all-reduces of the counts of rows."""
    entries: list[_FlowEntry] = []
    for kind, (exchange, exchange_bytes), (counts, count_bytes) in contexts:
        purpose = _CONTEXT_PURPOSES[kind]
        entries += [
            ("exchange", purpose, "all_to_all", "context", microbatches * exchange, microbatches * exchange_bytes),
            ("exchange", "counts of rows", "all_reduce", "context", microbatches * counts, microbatches * count_bytes),
        ]
    return entries


def _muon(muon: Muon, sizes: Sizes) -> list[_FlowEntry]:
    """For each matrix batch: parts to their owners and back; results gathered among replicas, padded to equal counts.

    If experts are sharded by width, one all-reduce, a byte a matrix, agrees on which experts are starved.
    """
    flags = sum(state["starved_steps"].to_local().numel() for state in muon.state.values() if "starved_steps" in state)
    entries: list[_FlowEntry] = []
    if sizes.experts_by == "width" and flags > 0:
        entries.append(("update", "Muon, starved experts", "all_reduce", "expert_shard", 1, flags))
    for batch in muon.batches:
        matrices, shared = matrices_per_rank(muon, batch, sizes.replicate)
        if batch.exchange:
            along = "shard" if batch.exchange.group.size() == sizes.shard else "expert_shard"
            elements = sum(batch.exchange.sent) + sum(batch.exchange.received)
            size = elements * muon.wire.itemsize
            entries.append(("update", "Muon, to owners and back", "all_to_all", along, 2, size))
        if shared:
            numel = -(-matrices // sizes.replicate) * sizes.replicate * batch.shape[0] * batch.shape[1]
            size = numel * muon.wire.itemsize
            entries.append(("update", "Muon, among copies", "all_gather", "replicate", 1, size))
    return entries


def _step_metrics(config: RunConfig, sizes: Sizes, load: RankLoad) -> list[_FlowEntry]:
    """Collectives of the step's metrics.

    Summed over ranks: valid targets, tokens per layer and expert, and the gradient norm. Gathered from each rank: loss
    and valid targets of each row, five sums, and the entropy of each router.
    """
    moe_layers, world = config.model.moe_layers, sizes.replicate * sizes.shard
    counts = 8 * moe_layers * config.model.experts
    return [
        ("update", "figures", "all_reduce", "world", 1 + (moe_layers > 0), 8 + counts),
        ("update", "figures", "all_reduce", "shard", 1, 8),
        ("update", "figures", "all_gather", "world", 1, 8 * world * (2 * load.rows + 5 + moe_layers)),
    ]
