"""Count this process's collectives: calls and bytes of each kind.

    with count_collectives() as traffic:
        train_step(...)
    calls, size = traffic["all_gather", 8]  # over groups of 8 ranks

Every collective passes torch's dispatcher, whether an FSDP hook, a backward pass or plain code calls it, for any
backend. It is counted there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Traffic(NamedTuple):
    """Number of calls, and bytes in total."""

    calls: int
    bytes: int


# name of the operation (its trailing _ dropped) in torch.ops.c10d or torch.ops._c10d_functional → kind
_KINDS = {
    "_allgather_base": "all_gather",
    "allgather": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_out": "reduce_scatter",
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "alltoall_base": "all_to_all",
    "alltoall": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
}


@contextmanager
def count_collectives() -> Iterator[dict[tuple[str, int], Traffic]]:
    """Count this process's collectives while the block runs.

    Yields:
        (kind, size of the group) → calls and bytes; kinds: "all_gather", "reduce_scatter", "all_reduce", "all_to_all",
        "broadcast". Bytes are those of the full tensor on this rank: the gathered tensor, the tensor to be reduced or
        broadcast, all rows given to an all-to-all, the rank's own included. Object collectives count as the tensors
        that they send.
    """
    traffic: dict[tuple[str, int], Traffic] = {}
    with _Counter(traffic):
        yield traffic


class _Counter(TorchDispatchMode):
    def __init__(self, traffic: dict[tuple[str, int], Traffic]) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # a DTensor unwraps itself, and its collectives arrive here
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        kind = _KINDS.get(name.partition(".")[0].rstrip("_")) if "c10d" in namespace else None
        if kind is not None:
            # c10d operations take the output before the input, or one tensor in place; functional ones take the input
            # and return the output
            outputs = args[0] if namespace == "c10d" else result
            inputs = args[int(func._schema.arguments[0].name.startswith("output"))]
            whole = outputs if kind == "all_gather" else inputs
            key = kind, _group_size(args)
            before = self.traffic.get(key, Traffic(0, 0))
            self.traffic[key] = Traffic(before.calls + 1, before.bytes + _bytes(whole))
        return result


def _bytes(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_iter(tensors) if isinstance(x, Tensor))


def _group_size(args: tuple) -> int:
    """Size of the process group among an operation's arguments: an object, or (functional) a name, the last string."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(argument).size()
            except RuntimeError:  # a ReduceOp is a ScriptObject too
                continue
    name = [argument for argument in args if isinstance(argument, str | dist.ProcessGroup)][-1]
    if isinstance(name, str):
        return dist.distributed_c10d._resolve_process_group(GroupName(name)).size()
    return name.size()
