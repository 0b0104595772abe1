"""DTensors for the optimizers: the local tensor, and the ranks over which its matrices are sharded or replicated.

A mesh dimension places a parameter, whose last two dimensions are matrices, in one of three ways:

    "replicate"                              replicates it: all ranks along the dimension hold the same part
    shards a leading dimension (experts)     every matrix is whole on one rank
    shards one of the last two dimensions    every matrix is spread over the ranks along it, in order, as by torch.chunk

A mesh dimension of size 1 does nothing. No other module of this folder unwraps a DTensor.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate


class MatrixSharding(NamedTuple):
    """The ranks over which each matrix of a parameter is sharded; the defaults mean whole matrices.

    group: those ranks. ranks: their number. rank: this one's number among them.
    dim: the sharded dimension, -2 rows or -1 columns.
    """

    group: ProcessGroup | None = None
    ranks: int = 1
    rank: int = 0
    dim: int = -2


def local_tensor(x: Tensor) -> Tensor:
    """The local tensor of x, not a copy, if x is a DTensor (call it under no_grad); any other x itself.

    The local tensor may be empty, or hold only a part of one of x's matrices (see `matrix_sharding`).
    """
    return x.to_local() if isinstance(x, DTensor) else x


def matrix_sharding(x: Tensor) -> MatrixSharding:
    """The ranks over which each matrix of x [..., m, n] is sharded.

    Raises:
        AssertionError: two mesh dimensions shard x's matrices, or one other than "replicate" does not shard x.
    """
    if not isinstance(x, DTensor):
        return MatrixSharding()
    shardings = [(x.device_mesh.get_group(i), dim - x.ndim) for i, dim in sharded_dims(x) if dim >= x.ndim - 2]
    if not shardings:
        return MatrixSharding()
    assert len(shardings) == 1, f"the matrices are cut twice, by {x.placements}"
    group, dim = shardings[0]
    return MatrixSharding(group, group.size(), group.rank(), dim)


def replicate_group(x: Tensor) -> ProcessGroup | None:
    """The ranks that hold the same part of x as this one; None if this rank is the only one."""
    if not isinstance(x, DTensor) or "replicate" not in (x.device_mesh.mesh_dim_names or ()):
        return None
    group = x.device_mesh.get_group("replicate")
    return group if group.size() > 1 else None


def sharded_dims(x: Tensor) -> Iterator[tuple[int, int]]:
    """(mesh dimension, the dimension of x that it shards) for every mesh dimension that shards x.

    Raises:
        AssertionError: a mesh dimension of several ranks, other than "replicate", does not shard x. A sum over the
            ranks of one replica of the model would count x once for each of them.
    """
    if not isinstance(x, DTensor):
        return
    names = x.device_mesh.mesh_dim_names or ("",) * x.device_mesh.ndim
    for i, (name, placement) in enumerate(zip(names, x.placements)):
        if x.device_mesh.size(i) > 1 and name != "replicate":
            same = placement.is_replicate() or placement.is_partial()
            assert not same, f"{placement} over mesh dimension {i} {name!r}: each but replicate must cut the parameter"
            # not isinstance(placement, Shard): a strided shard is another class, and its is_shard() is False
            yield i, placement.dim  # type: ignore[attr-defined]


def zeros_per_matrix(x: Tensor) -> Tensor:
    """fp32 zeros [*batch, 1, 1] for x [*batch, m, n], placed as x, but replicated where x's matrices are sharded."""
    part = local_tensor(x)
    zeros = torch.zeros((*part.shape[:-2], 1, 1), dtype=torch.float32, device=part.device)
    if not isinstance(x, DTensor):
        return zeros
    within_matrices = {i for i, dim in sharded_dims(x) if dim >= x.ndim - 2}
    placements = [Replicate() if i in within_matrices else placement for i, placement in enumerate(x.placements)]
    shape = torch.Size((*x.shape[:-2], 1, 1))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(zeros, x.device_mesh, placements, run_check=False, shape=shape, stride=stride)
