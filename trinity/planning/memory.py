"""The memory of one rank over a step, moment by moment, and the fullest moment.

    forward   state, what the blocks so far keep, what this block holds besides, its gathered weights and the next one's
    backward  the blocks up to this one, what this one holds besides, weights of this one and the one before it,
              whole gradients on their way (this block's and the one's after it), and shards of those that are done
    update    state, gradients, and what Newton-Schulz works on

State is exact; activations are measured on meta (activations.py); buffers of FSDP and of the update are estimated.
What the allocator wastes, and what CUDA and NCCL take, is not in it (advice.py).
"""

from collections.abc import Iterator
from typing import NamedTuple

from trinity.optim.muon import Muon
from trinity.parallel.grad_accumulation import SHARE_OF_DEVICE, unreduced_bytes
from trinity.planning.activations import Activations
from trinity.planning.fake_rank import Group, Sharded, state_bytes

NEWTON_SCHULZ = 6
"""Times the largest batch that an update takes: four while it computes, two for those under way. Ours."""


class Memory(NamedTuple):
    """Bytes of one rank by part, at one moment of a step."""

    moment: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(self.parts.values())


def fullest(rank: Sharded, parts: list[Activations], microbatches: int, unreduced: float) -> Memory:
    """The moment of a step at which memory is fullest.

    Args:
        parts: embedding, blocks and head, for one microbatch.
        microbatches: of a step; after the first, gradients are there from the beginning.
        unreduced: bytes of gradients that stay whole until the last microbatch; 0 where they are reduced each time.
    """
    state = state_bytes(rank.model, rank.optimizers)
    gradients = state.pop("gradients")
    update = {"gradients": gradients, "update of the largest matrices": _newton_schulz(rank.optimizers.muon)}
    moments = [*_passes(_buffers(rank.groups), parts, gradients, microbatches, unreduced), Memory("update", update)]
    fullest = max(moments, key=lambda memory: memory.total)
    return Memory(fullest.moment, state | fullest.parts)


def unreduced_gradients(rank: Sharded, asked: str, microbatches: int, memory: float) -> float:
    """Bytes of gradients that parallel.defer_reduce leaves whole on a GPU with so much memory; 0 where it does not."""
    sizes = rank.ranks.sizes
    whole = unreduced_bytes(rank.model, sizes.expert)
    auto = sizes.shard > 1 and whole <= SHARE_OF_DEVICE * memory
    return whole if microbatches > 1 and (asked == "on" or (asked == "auto" and auto)) else 0.0


class _Buffers(NamedTuple):
    """What FSDP holds of one part: weights gathered for use, or for good; its whole gradient on the way, and shards."""

    gathered: float
    kept: float
    reduced: float
    shards: float


def _buffers(groups: list[Group]) -> list[_Buffers]:
    """Of embedding, blocks and (final norm and) head."""
    names = [name for name in dict.fromkeys(group.part for group in groups) if name != "norm"]
    found = []
    for name in names:
        own = [group for group in groups if group.part == name or (name == "head" and group.part == "norm")]
        found.append(
            _Buffers(
                sum(group.gathered for group in own if group.shards > 1),
                sum(group.gathered for group in own if group.shards == 1),
                sum(group.reduced for group in own),
                sum(group.reduced / group.shards for group in own),
            )
        )
    return found


def _passes(
    buffers: list[_Buffers], parts: list[Activations], gradients: float, microbatches: int, unreduced: float
) -> Iterator[Memory]:
    always, shards = sum(buffer.kept for buffer in buffers), sum(buffer.shards for buffer in buffers)
    before = unreduced or (gradients if microbatches > 1 else 0.0)
    for i, (buffer, part) in enumerate(zip(buffers, parts)):
        neighbours = {step: buffers[i + step] for step in (-1, 1) if 0 <= i + step < len(buffers)}
        zero = _Buffers(0, 0, 0, 0)
        name = {0: "the embedding", len(parts) - 1: "the head"}.get(i, f"block {i - 1}")
        kept = sum(part.kept for part in parts[: i + 1])
        yield Memory(
            f"forward of {name}",
            {
                "gradients": before,
                "gathered weights": always + buffer.gathered + neighbours.get(1, zero).gathered,
                "activations": kept,
                f"work of {name}": max(0.0, part.forward - part.kept),
            },
        )
        yield Memory(
            f"backward of {name}",
            {
                "gradients": before or gradients * sum(buffer.shards for buffer in buffers[i:]) / shards,
                "gathered weights": always + buffer.gathered + neighbours.get(-1, zero).gathered,
                "whole gradients being reduced": buffer.reduced + neighbours.get(1, zero).reduced,
                "activations": kept,
                f"work of {name}": part.backward,
            },
        )


def _newton_schulz(muon: Muon) -> float:
    largest = 0
    for batch in muon.batches:
        whole = batch.owned
        sent = sum(batch.exchange.sent) if batch.exchange else 0
        largest = max(largest, whole * batch.shape[0] * batch.shape[1], sent)
    return NEWTON_SCHULZ * 4 * largest
