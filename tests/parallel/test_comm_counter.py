"""The counter of collectives against counts by hand."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from trinity.parallel.collectives import all_gather_single
from trinity.parallel.comm_counter import count_collectives


def counted_collectives() -> list[tuple]:
    """Counts of every kind of collective over four ranks and over pairs: called directly, by a DTensor, in backward."""
    rank, x = dist.get_rank(), torch.ones(8)  # 32 bytes
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    pair = pairs.get_group("inner")
    with count_collectives() as traffic:
        dist.all_reduce(x)
        all_gather_single(torch.empty(32), x)
        dist.all_gather([torch.empty(8), torch.empty(8)], x, group=pair)
        dist.reduce_scatter_tensor(torch.empty(4), x, group=pair)
        dist.broadcast(x, 2 * (rank // 2), group=pair)
        sent = [2, 6] if rank % 2 else [5, 3]
        received = [5, 2] if rank % 2 == 0 else [3, 6]
        dist.all_to_all_single(torch.empty(sum(received)), x, received, sent, group=pair)
        matrix = DTensor.from_local(x.view(2, 4), pairs["inner"], [Shard(0)])
        matrix @ matrix  # gathers the second factor
        y = torch.ones(6, requires_grad=True)
        functional.all_to_all_single_autograd(y, [3, 3], [3, 3], pair).sum().backward()
        functional.all_reduce(x, "sum", pair)
    dist.all_reduce(x)  # after the block: not counted
    return sorted((*key, *value) for key, value in traffic.items())


def test_calls_and_bytes(processes: Callable) -> None:
    """By hand: bytes gathered, reduced and sent; a backward all-to-all sends as much as its forward."""
    expected = [
        ("all_gather", 2, 2, 64 + 64),
        ("all_gather", 4, 1, 128),
        ("all_reduce", 2, 1, 32),
        ("all_reduce", 4, 1, 32),
        ("all_to_all", 2, 3, 32 + 24 + 24),
        ("broadcast", 2, 1, 32),
        ("reduce_scatter", 2, 1, 32),
    ]
    assert processes(4).run(counted_collectives) == [expected] * 4
