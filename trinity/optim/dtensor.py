"""The one place where the optimizer looks through a DTensor: what this rank holds of it, and who holds the rest.

A dimension of a mesh does one of three things to a parameter whose last two dimensions are matrices:

    "replicate"                            cuts nothing: all ranks along it hold the same
    cuts a leading dimension (experts)     every matrix lies whole on one rank
    cuts one of the last two               every matrix is spread over the ranks along it, in order, as torch.chunk cuts

A dimension of size 1 does nothing.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate


class Spread(NamedTuple):
    """Over which ranks each matrix of a parameter is spread; the defaults are for whole matrices.

    group: those ranks, how many they are, and which of them this one is. dim: what they cut, -2 rows, -1 columns.
    """

    group: ProcessGroup | None = None
    ranks: int = 1
    rank: int = 0
    dim: int = -2


def local_tensor(x: Tensor) -> Tensor:
    """x's own storage on this rank: of a DTensor its local tensor (call it under no_grad), of any other x itself.

    It may be a part of x, even a part of one of x's matrices (`spread` says), or empty.
    """
    return x.to_local() if isinstance(x, DTensor) else x


def spread(x: Tensor) -> Spread:
    """Over which ranks each matrix of x [..., m, n] is spread.

    Raises:
        AssertionError: two dimensions of the mesh cut x's matrices, or one other than "replicate" does not cut x.
    """
    found = [(x.device_mesh.get_group(i), dim - x.ndim) for i, dim in cuts(x) if dim >= x.ndim - 2]
    if not found:
        return Spread()
    assert len(found) == 1, f"the matrices are cut twice, by {x.placements}"
    group, dim = found[0]
    return Spread(group, group.size(), group.rank(), dim)


def replicas(x: Tensor) -> ProcessGroup | None:
    """The ranks that hold the same part of x as this one; None if it is alone."""
    if not isinstance(x, DTensor) or "replicate" not in (x.device_mesh.mesh_dim_names or ()):
        return None
    group = x.device_mesh.get_group("replicate")
    return group if group.size() > 1 else None


def cuts(x: Tensor) -> Iterator[tuple[int, int]]:
    """(dimension of the mesh, dimension of x that it cuts), for every dimension of the mesh that does.

    Raises:
        AssertionError: several ranks along a dimension other than "replicate" hold the same of x, which would count
            once for each of them in a sum over the ranks of one copy.
    """
    if not isinstance(x, DTensor):
        return
    names = x.device_mesh.mesh_dim_names or ("",) * x.device_mesh.ndim
    for i, (name, placement) in enumerate(zip(names, x.placements)):
        if x.device_mesh.size(i) > 1 and name != "replicate":
            same = placement.is_replicate() or placement.is_partial()
            assert not same, f"{placement} over mesh dimension {i} {name!r}: each but replicate must cut the parameter"
            yield i, placement.dim  # a strided shard has a dim as well, but its is_shard() says no


def zeros_per_matrix(x: Tensor) -> Tensor:
    """fp32 zeros [*batch, 1, 1] for x [*batch, m, n], placed as x, but whole where x's matrices are spread."""
    part = local_tensor(x)
    zeros = torch.zeros((*part.shape[:-2], 1, 1), dtype=torch.float32, device=part.device)
    if not isinstance(x, DTensor):
        return zeros
    spreading = {i for i, dim in cuts(x) if dim >= x.ndim - 2}
    placements = [Replicate() if i in spreading else placement for i, placement in enumerate(x.placements)]
    shape = torch.Size((*x.shape[:-2], 1, 1))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(zeros, x.device_mesh, placements, run_check=False, shape=shape, stride=stride)
