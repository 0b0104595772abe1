"""What the processes of a run must decide together: whether one failed, whether one was asked to stop.

A process that goes its own way leaves the others waiting in a collective for ever. These go over gloo, on the CPU, so
that they neither wait for a device nor need one.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from trinity.errors import USER_MISTAKE, Failure, UserError, explain

Result = TypeVar("Result")

# torch 2.13 renamed it and warns of the old name
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def run_on_all_ranks(action: Callable[[], Result]) -> Result:
    """Run `action`, which talks to no other rank, on every rank; where one fails by no fault of ours, all do.

    Outside of a process group there is but this process.

    Raises:
        UserError, Failure: what the first rank that failed has to say, on every rank.
    """
    if not dist.is_initialized():
        return action()
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = explain(error)
        if failure is None:
            raise
    failures: list[tuple[int, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for rank, failed in enumerate(failures):
        if failed is not None:
            code, text = failed
            raise (UserError if code == USER_MISTAKE else Failure)(f"rank {rank}: {text}" if rank else text)
    return result


def run_on_rank0(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 alone; its result, which can be pickled, or its failure reaches every rank."""
    if not dist.is_initialized():
        return action()
    result = [run_on_all_ranks(action if dist.get_rank() == 0 else lambda: None)]
    dist.broadcast_object_list(result, src=0)
    return result[0]


def reraise(error: BaseException | None) -> None:
    """What failed earlier on this rank, if anything did: for `together`, where all ranks have come to."""
    if error is not None:
        raise error


def all_reduce_max(flags: list[int]) -> list[int]:
    """The largest of each flag over all ranks."""
    agreed = torch.tensor(flags, dtype=torch.int64)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return agreed.tolist()
