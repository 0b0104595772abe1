"""Tensor operations that export and import share: data types on disk, and parts of sharded tensors."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trinity.interop.weight_map import Index
from trinity.models.param_roles import parameter_roles


def storage_dtypes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The data type of every parameter of a model whose matrices are stored in `dtype`.

    Gains and routers stay in fp32 (float64 in a float64 model): the model computes with them in that precision, and
    together they are a thousandth of Nano and less of the larger models.

    Returns:
        full name of the parameter → its data type. Buffers are not included: they are always fp32.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return {role.name: wide if role.kind in ("gain", "router") else dtype for role in parameter_roles(model)}


def part_shape(shape: torch.Size, index: Index) -> tuple[int, ...]:
    """The shape of tensor[index] for a tensor of shape `shape`, without making it."""
    return tuple(torch.empty(shape, device="meta")[index].shape)


def local_part(tensor: Tensor, index: Index) -> tuple[Tensor, tuple[slice, ...]] | None:
    """The part of tensor[index] that is in this rank's shard.

    Args:
        tensor: a parameter, sharded or not.
        index: integers and slices with both ends, for the first dimensions.
    Returns:
        (a view of the rank's shard, without the dimensions that an integer indexes; its position in tensor[index]).
        None if tensor[index] is entirely on other ranks.
    """
    local, offset = tensor, (0,) * tensor.dim()
    if isinstance(tensor, DTensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        # the rows of a rank are contiguous, also of experts: these are divided among ranks before FSDP2 shards them
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        local = tensor.to_local()
    in_shard: list[int | slice] = []
    in_part: list[slice] = []
    for dim, (size, start) in enumerate(zip(local.shape, offset)):
        entry = index[dim] if dim < len(index) else slice(0, tensor.shape[dim])
        low, high = (entry, entry + 1) if isinstance(entry, int) else (entry.start, entry.stop)
        first, last = max(low, start), min(high, start + size)
        if first >= last:
            return None
        if isinstance(entry, int):
            in_shard.append(entry - start)
        else:
            in_shard.append(slice(first - start, last - start))
            in_part.append(slice(first - low, last - low))
    return local[tuple(in_shard)], tuple(in_part)


def gather_part(tensor: Tensor, index: Index) -> Tensor | None:
    """Gather tensor[index] on rank 0; returns None on the other ranks. Collective over the mesh of a sharded tensor.

    A rank holds no more than its own shard and this part. Each rank copies its local part into zeros; a reduce along
    one mesh dimension after the other adds these up. HSDP replicas beyond the first take no part.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor[index]
    mesh = tensor.device_mesh
    names, coordinates = mesh.mesh_dim_names, mesh.get_coordinate()
    assert names is not None  # every mesh here is named
    assert coordinates is not None  # this rank is in it
    position = dict(zip(names, coordinates))
    if position.pop("replicate", 0):
        return None
    part = torch.zeros(part_shape(tensor.shape, index), dtype=tensor.dtype, device=tensor.device)
    if (local := local_part(tensor, index)) is not None:
        view, where = local
        part[where] = view
    for dimension, coordinate in position.items():
        group = mesh.get_group(dimension)
        dist.reduce(part, dist.get_global_rank(group, 0), group=group)
        if coordinate:
            return None
    return part
