"""Clipping by the global norm: one norm over all gradients, one factor for all of them.

Neither function waits for the device: the norm and the factor stay tensors.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from trinity.optim.local import local


@torch.no_grad()
def global_norm(tensors: Iterable[Tensor | None]) -> Tensor:
    """The 2-norm of all elements of all tensors together: of the gradients, or of the parameters.

    Each row is summed in fp32 and the rows in float64: one fp32 sum of ten million elements is off by 4e-4 on CPU.

    Args:
        tensors: any shapes, DTensors too; the norm is of the values given, so pass `p.grad` for p's gradient. None is
            skipped. All on one device.
    Returns:
        A scalar, fp32, or float64 if any tensor is; 0 when there are none.
    """
    parts = [local(x) for x in tensors if x is not None]
    if not parts:
        return torch.zeros(())
    dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    rows = [torch.linalg.vector_norm(torch.atleast_1d(part), dim=-1, dtype=dtype).flatten() for part in parts]
    return torch.linalg.vector_norm(torch.cat(rows), dtype=torch.float64).to(dtype)


@torch.no_grad()
def clip_(grads: Iterable[Tensor | None], norm: Tensor, max_norm: float) -> None:
    """Multiply every gradient in place by min(1, max_norm/norm).

    No epsilon is added: gradients whose norm is at most max_norm stay bit for bit. A norm that is not finite makes
    the gradients NaN or 0, so a step that is to be skipped for it must be skipped by the caller.

    Args:
        grads: any shapes and dtypes, DTensors too; None is skipped.
        norm: scalar: global_norm of these gradients.
        max_norm: the largest norm allowed, > 0; math.inf never clips.
    """
    parts = [local(grad) for grad in grads if grad is not None]
    if parts:
        torch._foreach_mul_(parts, (max_norm / norm).clamp(max=1.0))
