"""The static layout of a Muon step: which matrices go through Newton-Schulz as one batch, and on which rank.

Newton-Schulz needs whole matrices. A matrix that is whole on one rank is orthogonalized there. A matrix that is sharded
over ranks has one owner among them. Owners are assigned by cost, the most expensive matrix first, each to the rank with
the least load so far, over all shapes. A batch holds matrices of one shape, up to a number of bytes on each owner, and
one all-to-all each way moves it. Every rank computes the same layout without communication.

FSDP shards the rows of a fused parameter as a whole, not matrix by matrix, so some ranks may hold no row of a matrix:

    rows of the parameter   |     q      | k | v |    gate    |
    ranks                   |    0    |    1    |    2    | 3 |      ⌈rows/4⌉ each; the last may have fewer, or none
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trinity.models.param_roles import Role
from trinity.optim.dtensor import local_tensor, matrix_sharding, replicate_group
from trinity.optim.newton_schulz import newton_schulz_flops

MatrixShard = tuple[slice, slice]  # the rows and columns of a matrix that a rank holds; may be empty


class MatrixStack(NamedTuple):
    """Consecutive matrices of one parameter, or this rank's shards of them, as laid out in its memory.

    The local tensor [*batch, rows, n] is a stack of prod(batch) entries. first, length: the entries. rows: the rows of
    each entry that make the matrix.
    """

    role: Role
    first: int
    length: int
    rows: slice

    def view(self, x: Tensor) -> Tensor:
        """[length, rows, n], a view of the local part of `x`, a tensor that is placed as the parameter."""
        x = local_tensor(x)
        return x.view(x.shape[:-2].numel(), *x.shape[-2:])[self.first : self.first + self.length, self.rows]


class Matrix(NamedTuple):
    """One matrix of `shape`: this rank's part of it, and every rank's shard of it (a single one if it is whole)."""

    shape: tuple[int, int]
    stack: MatrixStack
    shards: list[MatrixShard]


class OwnerExchange(NamedTuple):
    """The all-to-all that brings a batch to its owners; the way back swaps sent and received.

    group: the ranks over which the matrices are sharded. owned: how many matrices of the batch this rank owns.
    shards: (which of the owned matrices, shard), in the order in which the shards arrive: by rank.
    sent, received: number of elements to and from each rank.
    """

    group: ProcessGroup
    owned: int
    shards: list[tuple[int, MatrixShard]]
    sent: list[int]
    received: list[int]


class MatrixBatch(NamedTuple):
    """Matrices of one shape [m, n] that go through Newton-Schulz together.

    stacks: this rank's parts of them, in the order in which they are sent to the owners.
    replicas: the ranks that hold the same parts, None if there are none.
    exchange: None where every matrix is whole on one rank.
    """

    shape: tuple[int, int]
    stacks: list[MatrixStack]
    replicas: ProcessGroup | None
    exchange: OwnerExchange | None

    @property
    def owned(self) -> int:
        """How many matrices this rank orthogonalizes, if its replicas do not share them."""
        return self.exchange.owned if self.exchange else sum(stack.length for stack in self.stacks)


def make_batches(roles: list[Role], max_bytes: int) -> list[MatrixBatch]:
    """The batches of a step, in the same order on all ranks; exchanged batches alternate with those that stay local.

    Args:
        max_bytes: bytes of matrices (in the momentum's dtype) in a batch on one owner, unless a single matrix is
            larger. The number of matrices is rounded up to a multiple of the replicas, which may share them.
    """
    by_ranks: dict[tuple[ProcessGroup | None, ProcessGroup | None, int], list[Matrix]] = defaultdict(list)
    for role in roles:
        itemsize = torch.promote_types(role.parameter.dtype, torch.float32).itemsize
        key = matrix_sharding(role.parameter).group, replicate_group(role.parameter), itemsize
        by_ranks[key] += _matrices(role)
    local: list[MatrixBatch] = []
    exchanged: list[MatrixBatch] = []
    for (group, replicas, itemsize), matrices in by_ranks.items():
        ranks, sharers = group.size() if group else 1, replicas.size() if replicas else 1
        for by_owner in _batches_by_owner(matrices, ranks, max_bytes // itemsize, sharers):
            batch = [matrix for own in by_owner for matrix in own]
            exchange = _owner_exchange(by_owner, group) if group else None
            made = MatrixBatch(batch[0].shape, _merge_stacks(batch), replicas, exchange)
            (exchanged if exchange else local).append(made)
    return [batch for pair in zip_longest(exchanged, local) for batch in pair if batch]


def assign_owners(costs: Sequence[float], ranks: int) -> list[int]:
    """The owner of each job: the most expensive first, each to the rank with the least load; ties go to the first."""
    owners, loads = [0] * len(costs), [0.0] * ranks
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        owners[job] = loads.index(min(loads))
        loads[owners[job]] += costs[job]
    return owners


def matrix_shards(first: int, rows: int, size: tuple[int, int], dim: int, ranks: int) -> list[MatrixShard]:
    """Each rank's shard of the matrix in rows first … first+rows of a parameter of this size, sharded along `dim`."""
    chunk = -(-size[dim] // ranks)
    ends = [min(rank * chunk, size[dim]) for rank in range(ranks + 1)]
    if dim == -1:
        return [(slice(0, rows), slice(*end)) for end in pairwise(ends)]
    inside = [min(max(end - first, 0), rows) for end in ends]
    return [(slice(*end), slice(0, size[-1])) for end in pairwise(inside)]


def _matrices(role: Role) -> Iterator[Matrix]:
    """All matrices of a parameter that this rank holds, whole or sharded."""
    sharding, part = matrix_sharding(role.parameter), local_tensor(role.parameter)
    *_, m, n = role.parameter.shape
    top = 0  # this rank's parts of the packed matrices follow one another in its memory
    for first, rows in zip(accumulate(role.rows, initial=0), role.rows):
        shards = matrix_shards(first, rows, (m, n), sharding.dim, sharding.ranks)
        own_rows = shards[sharding.rank][0]
        bottom = top + own_rows.stop - own_rows.start
        for index in range(part.shape[:-2].numel()):
            yield Matrix((rows, n), MatrixStack(role, index, 1, slice(top, bottom)), shards)
        top = bottom
    assert top == part.shape[-2], f"{role.name}: {part.shape[-2]} rows on a rank that should hold {top}"


def _batches_by_owner(
    matrices: list[Matrix], ranks: int, max_elements: int, sharers: int
) -> Iterator[list[list[Matrix]]]:
    """Assign an owner to each matrix, then batch those of one shape: a list of matrices for each owner."""
    by_shape: dict[tuple[int, int], list[list[Matrix]]] = {}
    owners = assign_owners([newton_schulz_flops(*matrix.shape, steps=1) for matrix in matrices], ranks)
    for matrix, owner in zip(matrices, owners):
        by_shape.setdefault(matrix.shape, [[] for _ in range(ranks)])[owner].append(matrix)
    for shape, by_owner in by_shape.items():
        most = max(1, max_elements // math.prod(shape))
        most = -(-most // sharers) * sharers
        for first in range(0, max(map(len, by_owner)), most):
            yield [own[first : first + most] for own in by_owner]


def _owner_exchange(by_owner: list[list[Matrix]], group: ProcessGroup) -> OwnerExchange:
    def elements(matrices: list[Matrix], rank: int) -> int:
        return sum(math.prod(side.stop - side.start for side in matrix.shards[rank]) for matrix in matrices)

    rank, ranks = group.rank(), range(group.size())
    own = by_owner[rank]
    shards = [(index, matrix.shards[sender]) for sender in ranks for index, matrix in enumerate(own)]
    sent = [elements(matrices, rank) for matrices in by_owner]
    return OwnerExchange(group, len(own), shards, sent, [elements(own, sender) for sender in ranks])


def _merge_stacks(batch: list[Matrix]) -> list[MatrixStack]:
    """This rank's parts of a batch in as few stacks as possible: thousands of experts in one tensor are one stack."""
    stacks: list[MatrixStack] = []
    for _, stack, _ in batch:
        last = stacks[-1] if stacks else None
        if last and last._replace(first=stack.first, length=1) == stack and last.first + last.length == stack.first:
            stacks[-1] = last._replace(length=last.length + 1)
        else:
            stacks.append(stack)
    return stacks
