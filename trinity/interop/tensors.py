"""What export and import both ask of a tensor: its format on disk, the shape of a part of it, and all of it."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trinity.interop.names import Index
from trinity.models.roles import parameter_roles


def dtypes_of(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The number format of every parameter of a model that is kept in `dtype`.

    Gains and routers stay in fp32 (float64 in a float64 model): the model multiplies them in that precision, and
    together they are a thousandth of Nano and less of the larger models.

    Returns:
        full name of the parameter → its format. Buffers are not in it: they are fp32 always.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return {role.name: wide if role.kind in ("gain", "router") else dtype for role in parameter_roles(model)}


def part_shape(shape: torch.Size, index: Index) -> tuple[int, ...]:
    """The shape of tensor[index], of a tensor of `shape` that need not exist."""
    return tuple(torch.empty(shape, device="meta")[index].shape)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered where it is sharded: then every rank of its mesh must call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
