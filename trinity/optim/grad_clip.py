"""Gradient clipping by the global norm: one norm over all gradients, one factor for all of them.

Neither function synchronizes with the device: the norm and the factor stay tensors.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from trinity.optim.dtensor import local_tensor, sharded_dims


@torch.no_grad()
def global_norm(tensors: Iterable[Tensor | None], group: ProcessGroup | None = None) -> Tensor:
    """The 2-norm over all elements of all tensors (gradients or parameters).

    Each row is summed in fp32 and the rows in float64: one fp32 sum of ten million elements is off by 4e-4 on CPU. Rows
    sharded over several ranks are summed shard by shard, so an fp32 norm may differ in its last bits from that of one
    process.

    Args:
        tensors: any shapes, DTensors too; pass `p.grad` for p's gradient. None is skipped. All on one device.
        group: the ranks of one replica of the model, which hold every element of a DTensor exactly once; all of them
            call this. A tensor that is not a DTensor counts on each rank. None: the norm of this rank's tensors only.
    Returns:
        A scalar, fp32, or float64 if any tensor is; 0 for no tensors. The same on all ranks of the group.
    Raises:
        AssertionError: a DTensor that several ranks of a replica hold in full; its elements would count more than once.
    """
    parts = []
    for x in tensors:
        if x is not None:
            list(sharded_dims(x))  # asserts that each mesh dimension but "replicate" shards it
            parts.append(local_tensor(x))
    dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    rows = [torch.linalg.vector_norm(torch.atleast_1d(part), dim=-1, dtype=dtype).flatten() for part in parts]
    norm = torch.linalg.vector_norm(torch.cat(rows) if rows else torch.zeros(1), dtype=torch.float64)
    if group is not None and group.size() > 1:
        square = norm.square()
        dist.all_reduce(square, group=group)
        norm = square.sqrt()
    return norm.to(dtype)


@torch.no_grad()
def clip_(grads: Iterable[Tensor | None], norm: Tensor, max_norm: float) -> None:
    """Multiply every gradient in place by min(1, max_norm/norm).

    No epsilon is added: gradients whose norm is at most max_norm stay bit for bit. A norm that is not finite makes
    the gradients NaN or 0; the caller must skip that step.

    Args:
        grads: any shapes and dtypes, DTensors too (each rank multiplies its part); None is skipped.
        norm: scalar, global_norm of these gradients over all ranks of a replica.
        max_norm: the largest norm allowed, > 0; math.inf never clips.
    """
    parts = [local_tensor(grad) for grad in grads if grad is not None]
    if parts:
        torch._foreach_mul_(parts, (max_norm / norm).clamp(max=1.0))
