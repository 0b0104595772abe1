"""What export and import both ask of a tensor: its format on disk, and a part of it wherever its shards are."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trinity.interop.weight_map import Index
from trinity.models.param_roles import parameter_roles


def storage_dtypes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
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


def local_part(tensor: Tensor, index: Index) -> tuple[Tensor, tuple[slice, ...]] | None:
    """What this rank holds of tensor[index].

    Args:
        tensor: a parameter, sharded or not.
        index: integers and slices with both ends, for the first dimensions.
    Returns:
        a view of the rank's own memory, without the dimensions that an integer picks from, and where it stands in
        tensor[index]; None where the rank holds nothing of it.
    """
    local, offset = tensor, (0,) * tensor.dim()
    if isinstance(tensor, DTensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        # a rank's rows lie together, experts' too: they are split among ranks before FSDP2 cuts each one's share
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        local = tensor.to_local()
    here: list[int | slice] = []
    there: list[slice] = []
    for dim, (size, start) in enumerate(zip(local.shape, offset)):
        part = index[dim] if dim < len(index) else slice(0, tensor.shape[dim])
        low, high = (part, part + 1) if isinstance(part, int) else (part.start, part.stop)
        first, last = max(low, start), min(high, start + size)
        if first >= last:
            return None
        if isinstance(part, int):
            here.append(part - start)
        else:
            here.append(slice(first - start, last - start))
            there.append(slice(first - low, last - low))
    return local[tuple(here)], tuple(there)


def gather_part(tensor: Tensor, index: Index) -> Tensor | None:
    """tensor[index] on rank 0, None elsewhere; of a sharded tensor every rank of its mesh must call this.

    No rank holds more of the tensor than its own shard and this part: each puts what it owns into zeros, and these are
    added up along one dimension of the mesh after the other. Copies of the model beyond the first take no part.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor[index]
    mesh = tensor.device_mesh
    place = dict(zip(mesh.mesh_dim_names, mesh.get_coordinate()))
    if place.pop("replicate", 0):
        return None
    part = torch.zeros(part_shape(tensor.shape, index), dtype=tensor.dtype, device=tensor.device)
    if (owned := local_part(tensor, index)) is not None:
        part[owned[1]] = owned[0]
    for dimension, coordinate in place.items():
        group = mesh.get_group(dimension)
        dist.reduce(part, dist.get_global_rank(group, 0), group=group)
        if coordinate:
            return None
    return part
