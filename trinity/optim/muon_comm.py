"""Communication of Muon: matrices to their owners and back, results among replicas, overlapped with computation.

A job is a generator that updates one batch and yields where it would wait for a transfer; `overlap` keeps several in
flight. Every rank must run the same jobs in the same order, and a job must yield equally often on all ranks, even on
a rank that holds or owns nothing: then all ranks call the collectives of every group in one order. The code is the same
for gloo and NCCL. A generator's local variables keep the tensors of a transfer alive until it is complete.

Shapes: N matrices of a batch on their owner, k of them on one replica, each [m, n]; flat tensors hold this rank's
shards one after the other.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from trinity.optim.muon_layout import OwnerExchange
from trinity.optim.newton_schulz import newton_schulz_flops
from trinity.parallel.collectives import all_gather_single

# Rates that `sharing_pays` assumes: FLOP/s of Newton-Schulz, and bytes/s that one rank receives from other replicas.
# Round numbers for a large GPU with one network card and for a CPU core or two; not from the report.
FLOPS = {"cuda": 400e12, "cpu": 50e9}
BYTES = {"cuda": 40e9, "cpu": 1e9}

Job = Generator[None, None, None]
Transfer = Generator[None, None, Tensor]


def overlap(jobs: Iterable[Job], max_in_flight: int) -> None:
    """Interleave jobs, at most `max_in_flight` at a time, resuming the one that has waited longest.

    A job is created only when there is room for it, so its memory is allocated then.
    """
    waiting: deque[Job] = deque()
    for job in jobs:
        _advance(job, waiting)
        while len(waiting) >= max_in_flight:
            _advance(waiting.popleft(), waiting)
    while waiting:
        _advance(waiting.popleft(), waiting)


def _advance(job: Job, waiting: deque[Job]) -> None:
    """Run a job to its next wait, which appends it to `waiting`, or to its end."""
    if next(job, "over") != "over":
        waiting.append(job)


def send_to_owners(flat: Tensor, exchange: OwnerExchange, shape: tuple[int, int]) -> Transfer:
    """One all-to-all: send this rank's shards of a batch, in the order of batch.stacks; return its own matrices.

    Returns:
        [N, m, n], the whole matrices that this rank owns, in the dtype of `flat`; N may be 0.
    """
    arrived = yield from _all_to_all(flat, exchange.sent, exchange.received, exchange.group)
    whole_Nmn = flat.new_empty(exchange.owned, *shape)
    if shards := [whole_Nmn[index, *shard] for index, shard in exchange.shards]:
        torch._foreach_copy_(shards, split_like(arrived, shards))
    return whole_Nmn


def return_from_owners(whole_Nmn: Tensor, exchange: OwnerExchange) -> Transfer:
    """The reverse all-to-all: send the shards of the owned matrices back; return this rank's own shards, flat."""
    flat = whole_Nmn.new_empty(sum(exchange.received))
    if shards := [whole_Nmn[index, *shard] for index, shard in exchange.shards]:
        torch._foreach_copy_(split_like(flat, shards), shards)
    return (yield from _all_to_all(flat, exchange.received, exchange.sent, exchange.group))


def _all_to_all(flat: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Transfer:
    arriving = flat.new_empty(sum(received))
    work = dist.all_to_all_single(arriving, flat, received, sent, group=group, async_op=True)
    yield
    work.wait()
    return arriving


def map_over_replicas(
    function: Callable[[Tensor], Tensor], x_Nmn: Tensor, replicas: ProcessGroup, wire: torch.dtype, share: bool
) -> Transfer:
    """function(x_Nmn); if `share`, each replica computes a part, and one all-gather makes it whole on all.

    Args:
        function: maps [k, m, n] to [k, m, n], each matrix on its own.
        x_Nmn: the same on all replicas.
        wire: dtype of the gathered results.
        share: the same on all replicas; if False, each computes everything.
    Returns:
        [N, m, n] in x's dtype, the same bits on all replicas; rounded to `wire` if it was gathered.
    """
    if not share:
        y_Nmn = function(x_Nmn)
        yield  # other ranks may have more matrices, and share: a job yields equally often on all ranks
        return y_Nmn
    part = math.ceil(len(x_Nmn) / replicas.size())
    x_kmn = x_Nmn[replicas.rank() * part :][:part]
    y_kmn = pad(function(x_kmn).to(wire), (0, 0, 0, 0, 0, part - len(x_kmn)))
    y_Nmn = y_kmn.new_empty(replicas.size() * part, *y_kmn.shape[1:])
    work = all_gather_single(y_Nmn, y_kmn, group=replicas, async_op=True)
    yield
    work.wait()
    return y_Nmn[: len(x_Nmn)].to(x_Nmn.dtype)


def sharing_pays(
    matrices: int, shape: tuple[int, int], steps: int, replicas: int, wire: torch.dtype, device: str
) -> bool:
    """Whether dividing `matrices` of `shape` among replicas saves more computing time than the all-gather takes."""
    part = math.ceil(matrices / replicas)
    saved = (matrices - part) * newton_schulz_flops(*shape, steps) / FLOPS[device]
    return saved > (replicas - 1) * part * math.prod(shape) * wire.itemsize / BYTES[device]


def all_reduce_and(flags: list[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Logical and of boolean tensors of any shapes over the ranks of a group, in one all-reduce."""
    flat = torch.cat([flag.flatten() for flag in flags]).to(torch.uint8)
    dist.all_reduce(flat, dist.ReduceOp.MIN, group=group)
    return split_like(flat.bool(), flags)


def split_like(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Consecutive views of a flat tensor, with the shapes of `tensors`."""
    return [part.view(x.shape) for part, x in zip(flat.split([x.numel() for x in tensors]), tensors)]
