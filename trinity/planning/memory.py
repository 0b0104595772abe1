"""Peak memory of one rank in a step, from an estimate at each moment of the step.

    forward   state, saved activations of the blocks so far, this block's temporaries, gathered weights of this block
              and the next
    backward  state, saved activations up to this block, its temporaries, gathered weights of this block and the one
              before, unsharded gradients of this block and the one after, gradient shards of the blocks that are done;
              groups on one rank have only the gradients themselves (parallel/one_rank_groups.py)
    update    state, gradients, and buffers of Newton-Schulz

State is exact; activations are measured on meta (activations.py); buffers of FSDP and of the update are estimated.
Fragmentation, CUDA and NCCL are not included: plan.py's USABLE_SHARE leaves room for them.
"""

from collections.abc import Iterator
from typing import NamedTuple

from trinity.optim.muon import Muon
from trinity.parallel.grad_accumulation import SHARE_OF_DEVICE, deferral_bytes, unreduced_bytes
from trinity.planning.activations import Activations
from trinity.planning.fake_rank import FakeRank, FsdpGroup, state_bytes

NEWTON_SCHULZ_BUFFERS = 6
"""Buffers of an update, in multiples of the largest matrix batch in fp32: four for the computation, two for batches in
flight. Not from the report: estimated."""


class Memory(NamedTuple):
    """Bytes of one rank by part, at one moment of a step."""

    moment: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())


def peak_moment(rank: FakeRank, parts: list[Activations], microbatches: int, unreduced: float) -> Memory:
    """The moment of a step at which memory is highest.

    Args:
        parts: activations of embedding, blocks and head, for one microbatch.
        microbatches: of a step; from the second on, gradients exist from the start of the forward pass.
        unreduced: bytes of unsharded gradients kept until the last microbatch; 0 if every microbatch reduces them.
    """
    state = state_bytes(rank.model, rank.optimizers)
    gradients = state.pop("gradients")
    update = {"gradients": gradients, "update of the largest matrices": _newton_schulz_bytes(rank.optimizers.muon)}
    passes = _forward_and_backward(_fsdp_buffers(rank.groups), parts, gradients, microbatches, unreduced)
    peak = max([*passes, Memory("update", update)], key=lambda memory: memory.total)
    return Memory(peak.moment, state | peak.parts)


def unreduced_gradients(rank: FakeRank, defer_reduce: str, microbatches: int, memory: float) -> float:
    """Bytes of unsharded gradients that parallel.defer_reduce keeps on a GPU with `memory` bytes; 0 if it does not."""
    auto = deferral_bytes(rank.model) <= SHARE_OF_DEVICE * memory
    defers = microbatches > 1 and (defer_reduce == "on" or (defer_reduce == "auto" and auto))
    return unreduced_bytes(rank.model) if defers else 0.0


class _Buffers(NamedTuple):
    """FSDP's bytes for one part of the model.

    gathered: weights gathered for use. kept: weights that are not sharded and stay. reduced: the unsharded gradient, of
    groups that reduce it. shards: the gradient's shards.
    """

    gathered: float
    kept: float
    reduced: float
    shards: float


def _fsdp_buffers(groups: list[FsdpGroup]) -> list[_Buffers]:
    """Of the embedding, each block, and the head with the final norm."""
    names = [name for name in dict.fromkeys(group.part for group in groups) if name != "norm"]
    buffers = []
    for name in names:
        members = [group for group in groups if group.part == name or (name == "head" and group.part == "norm")]
        buffers.append(
            _Buffers(
                sum(group.gathered for group in members if group.shards > 1),
                sum(group.gathered for group in members if group.shards == 1),
                sum(group.reduced for group in members if not group.local),
                sum(group.reduced / group.shards for group in members),
            )
        )
    return buffers


def _forward_and_backward(
    buffers: list[_Buffers], parts: list[Activations], gradients: float, microbatches: int, unreduced: float
) -> Iterator[Memory]:
    """Memory beside the state at the forward and backward pass of each part."""
    unsharded, shards = sum(buffer.kept for buffer in buffers), sum(buffer.shards for buffer in buffers)
    accumulated = unreduced or (gradients if microbatches > 1 else 0.0)
    none = _Buffers(0, 0, 0, 0)
    for i, (buffer, part) in enumerate(zip(buffers, parts)):
        previous = buffers[i - 1] if i > 0 else none
        following = buffers[i + 1] if i + 1 < len(buffers) else none
        name = {0: "the embedding", len(parts) - 1: "the head"}.get(i, f"block {i - 1}")
        kept = sum(part.kept for part in parts[: i + 1])
        yield Memory(
            f"forward of {name}",
            {
                "gradients": accumulated,
                "gathered weights": unsharded + buffer.gathered + following.gathered,
                "activations": kept,
                f"work of {name}": max(0.0, part.forward - part.kept),
            },
        )
        yield Memory(
            f"backward of {name}",
            {
                "gradients": accumulated or gradients * sum(buffer.shards for buffer in buffers[i:]) / shards,
                "gathered weights": unsharded + buffer.gathered + previous.gathered,
                "whole gradients being reduced": buffer.reduced + following.reduced,
                "activations": kept,
                f"work of {name}": part.backward,
            },
        )


def _newton_schulz_bytes(muon: Muon) -> float:
    """Bytes of the update's buffers, for the largest batch of matrices."""
    largest = 0
    for batch in muon.batches:
        sent = sum(batch.exchange.sent) if batch.exchange else 0
        largest = max(largest, batch.owned * batch.shape[0] * batch.shape[1], sent)
    return NEWTON_SCHULZ_BUFFERS * 4 * largest
