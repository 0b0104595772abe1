"""How matrices travel: parts to their owners and back, results among replicas, and all of it while others compute.

Whatever waits for a transfer is a generator that yields where it would wait; `overlap` keeps a few of them under way.
Every rank must run the same generators in the same order, and each must yield equally often on all ranks, whatever a
rank holds or owns: then all ranks call the collectives of every group in one order. Gloo and NCCL take the same lines.
A generator's locals keep the tensors of a transfer alive until it has been waited for.

Shapes: N matrices of a batch on their owner, each [m, n]; flat tensors hold parts one after the other.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from trinity.optim.muon_layout import MatrixBatch
from trinity.optim.newton_schulz import newton_schulz_flops

# What `pays` reckons with: FLOP/s of Newton-Schulz, and bytes/s that one rank gets from other replicas. Round numbers
# of ours, for a large GPU with one network card and for a CPU core or two.
FLOPS = {"cuda": 400e12, "cpu": 50e9}
BYTES = {"cuda": 40e9, "cpu": 1e9}

Job = Generator[None, None, None]
Transfer = Generator[None, None, Tensor]


def overlap(jobs: Iterable[Job], most: int) -> None:
    """Run jobs, at most so many at a time: while one waits the next begins, or the one that waited longest goes on."""
    waiting: deque[Job] = deque()
    for job in jobs:
        _advance(job, waiting)
        while len(waiting) >= most:
            _advance(waiting.popleft(), waiting)
    while waiting:
        _advance(waiting.popleft(), waiting)


def _advance(job: Job, waiting: deque[Job]) -> None:
    """Let a job run until it waits, which puts it at the end of the row, or is over."""
    if next(job, "over") != "over":
        waiting.append(job)


def to_owners(parts: Tensor, batch: MatrixBatch) -> Transfer:
    """One exchange: this rank's parts of a batch leave, flat and in the order of batch.held; all parts of the matrices
    that it owns come: [N, m, n] in the same dtype, N may be 0.
    """
    travel = batch.travel
    arrived = yield from _swap(parts, travel.sent, travel.received, travel.group)
    whole_Nmn = parts.new_empty(travel.owned, *batch.shape)
    if windows := [whole_Nmn[place, *window] for place, window in travel.windows]:
        torch._foreach_copy_(windows, pieces(arrived, windows))
    return whole_Nmn


def from_owners(whole_Nmn: Tensor, batch: MatrixBatch) -> Transfer:
    """The way back: all parts of the matrices that this rank owns leave, and its parts of the batch's come, flat."""
    travel = batch.travel
    leaving = whole_Nmn.new_empty(sum(travel.received))
    if windows := [whole_Nmn[place, *window] for place, window in travel.windows]:
        torch._foreach_copy_(pieces(leaving, windows), windows)
    return (yield from _swap(leaving, travel.received, travel.sent, travel.group))


def _swap(leaving: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Transfer:
    arriving = leaving.new_empty(sum(received))
    work = dist.all_to_all_single(arriving, leaving, received, sent, group=group, async_op=True)
    yield
    work.wait()
    return arriving


def divided(
    x_Nmn: Tensor, function: Callable[[Tensor], Tensor], replicas: ProcessGroup, wire: torch.dtype, worth: bool
) -> Transfer:
    """function(x_Nmn), of which each replica computes a part, if that is worth it; one gather makes it whole.

    Args:
        x_Nmn: the same on all replicas.
        function: takes [k, m, n] to [k, m, n], each matrix on its own.
        worth: the same on all replicas; otherwise each computes all of it.
    Returns:
        [N, m, n] in x's dtype, the same bits on all replicas; it has been rounded to `wire` where it travelled.
    """
    if not worth:
        y_Nmn = function(x_Nmn)
        yield  # other ranks may have more matrices, and share: see the module
        return y_Nmn
    share = math.ceil(len(x_Nmn) / replicas.size())
    mine_kmn = x_Nmn[replicas.rank() * share :][:share]
    y_kmn = pad(function(mine_kmn).to(wire), (0, 0, 0, 0, 0, share - len(mine_kmn)))
    y_Nmn = y_kmn.new_empty(replicas.size() * share, *y_kmn.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    work = gather(y_Nmn, y_kmn, group=replicas, async_op=True)
    yield
    work.wait()
    return y_Nmn[: len(x_Nmn)].to(x_Nmn.dtype)


def pays(size: tuple[int, int, int], steps: int, replicas: int, wire: torch.dtype, device: str) -> bool:
    """Whether sharing N matrices [m, n] (`size`) among replicas saves more seconds of maths than the gather takes."""
    matrices, rows, columns = size
    share = math.ceil(matrices / replicas)
    saved = (matrices - share) * newton_schulz_flops(rows, columns, steps) / FLOPS[device]
    return saved > (replicas - 1) * share * rows * columns * wire.itemsize / BYTES[device]


def on_every_rank(flags: list[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Which of the flags are set on all ranks of a group, in one reduction. bool tensors, any shapes."""
    flat = torch.cat([flag.flatten() for flag in flags]).to(torch.uint8)
    dist.all_reduce(flat, dist.ReduceOp.MIN, group=group)
    return pieces(flat.bool(), flags)


def pieces(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """A flat tensor as views that have the shapes of these tensors, one after the other."""
    return [part.view(one.shape) for part, one in zip(flat.split([one.numel() for one in like]), like)]
