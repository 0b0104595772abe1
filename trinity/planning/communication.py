"""What one rank says to others in a step: collectives by purpose, their bytes, and the seconds these take.

    passes     FSDP gathers each group of weights in forward, and again in backward where it was freed, every
               microbatch; gradients go to shards every microbatch or once a step (parallel.defer_reduce), and over the
               copies of the model once
    exchange   tokens to their experts and sums back, and their gradients (activations.py)
    update     Muon's matrices to their owners and back, results among copies: as the optimizer has laid them out; and
               what a step says about itself, some kilobytes

Calls and bytes are those of trinity.parallel.traffic: the whole that a collective is about on this rank. On the wire
goes (n − 1)/n of that in groups of n, twice for an all-reduce. A group with k ranks in a node has k network cards.
"""

from typing import NamedTuple

from trinity.config.run import RunConfig
from trinity.hardware import GPU
from trinity.optim.muon import Muon
from trinity.optim.muon_comm import sharing_pays
from trinity.optim.muon_layout import MatrixBatch
from trinity.parallel.comm_counter import Traffic
from trinity.parallel.mesh import Sizes
from trinity.planning.fake_rank import Group, Sharded
from trinity.planning.stretches import Load


class Flow(NamedTuple):
    """One purpose's collectives of one kind in one step of one rank.

    phase: "passes" (beside forward and backward), "exchange" (in their midst) or "update" (in the optimizers' step).
    along: the dimension of the mesh, of `ranks` ranks that stand `stride` apart in rank order; "world" is all.
    calls, bytes: as trinity.parallel.traffic counts them.
    """

    phase: str
    purpose: str
    kind: str
    along: str
    ranks: int
    stride: int
    calls: int
    bytes: float


def flows(config: RunConfig, rank: Sharded, load: Load, exchanged: list[Traffic], defer: bool) -> list[Flow]:
    """Everything that rank 0 says in a step, summed by purpose.

    Args:
        load: its part of the step.
        exchanged: each block's expert exchange for one microbatch.
        defer: whether gradients are reduced once a step.
    """
    sizes = rank.ranks.sizes
    calls, exchange = (load.microbatches * sum(column) for column in zip(*exchanged))
    found = [
        *_weights(rank.groups, load.microbatches),
        *_gradients(rank.groups, 1 if defer else load.microbatches),
        ("exchange", "tokens to experts and back", "all_to_all", "expert", calls, exchange),
        *_muon(rank.optimizers.muon, sizes),
        *_figures(config, sizes, load),
    ]
    sums: dict[tuple, tuple[int, float]] = {}
    for *key, calls, size in found:
        before = sums.get(tuple(key), (0, 0))
        sums[tuple(key)] = before[0] + calls, before[1] + size
    places = _places(sizes)
    spoken = [Flow(*key, *places[key[-1]], *amount) for key, amount in sums.items()]
    return [flow for flow in spoken if flow.ranks > 1 and flow.calls]


def seconds(flow: Flow, gpu: GPU, achieved: float) -> float:
    """How long a flow takes where nothing else uses the links.

    All-to-alls go straight to their targets. The others may go round in rings that enter a node once and leave it once,
    so that the network cards of all members in a node share the work.

    Args:
        achieved: share of the links' rates.
    """
    near = max(1, min(flow.ranks, gpu.per_node // flow.stride))
    if flow.kind == "all_to_all":
        to_each = flow.bytes / flow.ranks
        return max((near - 1) * to_each / gpu.node_link, (flow.ranks - near) * to_each / gpu.network) / achieved
    wire = flow.bytes * (flow.ranks - 1) / flow.ranks * (2 if flow.kind == "all_reduce" else 1)
    rate = gpu.node_link if near == flow.ranks else min(gpu.node_link, near * gpu.network)
    return wire / rate / achieved


def orthogonalized(muon: Muon, batch: MatrixBatch, replicas: int) -> tuple[int, bool]:
    """How many matrices of a batch this rank has, and whether the copies of the model divide them, on GPUs."""
    matrices = batch.owned
    if batch.replicas is None or muon.share == "off" or matrices < 2:
        return matrices, False
    pays = sharing_pays(matrices, batch.shape, muon.steps, replicas, muon.wire, "cuda")
    return matrices, muon.share == "on" or pays


_Spoken = tuple[str, str, str, str, int, float]
"""A flow before it has ranks: phase, purpose, kind, along, calls, bytes."""


def _places(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Each dimension's ranks and how far apart they stand."""
    return {
        "shard": (sizes.shard, 1),
        "expert": (sizes.expert, 1),
        "expert_shard": (sizes.expert_shard, sizes.expert),
        "replicate": (sizes.replicate, sizes.shard),
        "world": (sizes.replicate * sizes.shard, 1),
    }


def _by_mesh(groups: list[Group]) -> list[tuple[str, str, list[Group]]]:
    """Name, dimension and groups of what is not experts, and of experts."""
    experts = [group for group in groups if group.kind == "experts"]
    dense = [group for group in groups if group.kind != "experts"]
    return [("dense", "shard", dense), ("experts", "expert_shard", experts)]


def _weights(groups: list[Group], microbatches: int) -> list[_Spoken]:
    """For each pass of a microbatch that needs them and does not find them still there."""
    found = []
    for name, along, own in _by_mesh(groups):
        calls = microbatches * sum(group.gathers for group in own)
        size = microbatches * sum(group.gathers * group.gathered for group in own)
        found.append(("passes", f"weights, {name}", "all_gather", along, calls, size))
    return found


def _gradients(groups: list[Group], times: int) -> list[_Spoken]:
    """To shards so many times a step; over the copies of the model once."""
    found = []
    for name, along, own in _by_mesh(groups):
        whole, shards = sum(group.reduced for group in own), sum(group.reduced // group.shards for group in own)
        found.append(("passes", f"gradients, {name}", "reduce_scatter", along, times * len(own), times * whole))
        found.append(("passes", f"copies, {name}", "all_reduce", "replicate", len(own), shards))
    return found


def _muon(muon: Muon, sizes: Sizes) -> list[_Spoken]:
    """By batch: parts out and back, and results among copies, each of which computes as many, rounded up.

    Where experts are cut by width, the ranks also agree once, a byte a matrix, which of them are starved.
    """
    flags = sum(state["starved_steps"].to_local().numel() for state in muon.state.values() if "starved_steps" in state)
    cut = sizes.experts_by == "width" and flags > 0
    found = [("update", "Muon, starved experts", "all_reduce", "expert_shard", 1, flags)] if cut else []
    for batch in muon.batches:
        matrices, shared = orthogonalized(muon, batch, sizes.replicate)
        if batch.exchange:
            along = "shard" if batch.exchange.group.size() == sizes.shard else "expert_shard"
            elements = sum(batch.exchange.sent) + sum(batch.exchange.received)
            size = elements * muon.wire.itemsize
            found.append(("update", "Muon, to owners and back", "all_to_all", along, 2, size))
        if shared:
            numel = -(-matrices // sizes.replicate) * sizes.replicate * batch.shape[0] * batch.shape[1]
            size = numel * muon.wire.itemsize
            found.append(("update", "Muon, among copies", "all_gather", "replicate", 1, size))
    return found


def _figures(config: RunConfig, sizes: Sizes, load: Load) -> list[_Spoken]:
    """Valid targets, tokens per layer and expert; the gradient's norm; what each rank has to say of its rows.

    That is losses and valid targets by row, four sums, and the entropy of each router.
    """
    moe_layers, world = config.model.moe_layers, sizes.replicate * sizes.shard
    counts = 8 * moe_layers * config.model.experts
    return [
        ("update", "figures", "all_reduce", "world", 1 + (moe_layers > 0), 8 + counts),
        ("update", "figures", "all_reduce", "shard", 1, 8),
        ("update", "figures", "all_gather", "world", 1, 8 * world * (2 * load.rows + 4 + moe_layers)),
    ]
