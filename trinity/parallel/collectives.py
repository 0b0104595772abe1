"""Agreement among the processes of a run: one rank's error or flag reaches every rank.

A process that exits alone leaves the others waiting in their next collective. These functions go over gloo, on the CPU:
they need no device and wait for none. Outside of a process group they act on this process alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from trinity.errors import USER_MISTAKE, Failure, UserError, explain

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# torch 2.13 renamed it and warns of the old name
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@contextmanager
def errors_reach_all_ranks() -> Iterator[None]:
    """Context manager: an error that `explain` knows, raised in the block on any rank, is raised on every rank.

    Every rank enters the block; the block calls no collective. Leaving it is one all_gather_object. An error that
    `explain` does not know (a bug) is raised at once, on its own rank only.

    Raises:
        UserError, Failure: the message of the first rank that failed, on every rank.
    """
    if not dist.is_initialized():
        yield
        return
    failure = None
    try:
        yield
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


def run_on_all_ranks(action: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """Call `action(*args, **kwargs)` on every rank inside `errors_reach_all_ranks`; return this rank's result."""
    with errors_reach_all_ranks():
        result = action(*args, **kwargs)
    return result


def run_on_rank0(action: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """Call `action(*args, **kwargs)` on rank 0 only; return its result (pickled) or raise its error on every rank.

    The arguments are evaluated on every rank, before the call: pass a lambda where that is costly or may fail.
    """
    if not dist.is_initialized():
        return action(*args, **kwargs)
    result: list[Any] = [None]
    with errors_reach_all_ranks():
        if dist.get_rank() == 0:
            result[0] = action(*args, **kwargs)
    dist.broadcast_object_list(result, src=0)
    return result[0]


def reraise(error: BaseException | None) -> None:
    """Raise an earlier error of this rank, if there is one; for use inside `errors_reach_all_ranks`."""
    if error is not None:
        raise error


def all_reduce_max(flags: list[int]) -> list[int]:
    """Maximum of each flag over all ranks."""
    agreed = torch.tensor(flags, dtype=torch.int64)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return agreed.tolist()
