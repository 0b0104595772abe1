"""Which matrices go through Newton-Schulz together, and where: a static layout that every rank works out by itself.

Newton-Schulz needs whole matrices. Where a rank holds whole ones, it does them. A matrix that is spread over ranks has
one owner among them: the longest job is dealt first, each to the rank with the least to do so far, over all shapes. A
batch holds matrices of one shape, at most so many bytes of them on each owner, and travels to and fro as one.

A fused parameter is cut by its rows as a whole, not matrix by matrix, so a matrix may lie on some of the ranks only:

    rows of the parameter   |     q      | k | v |    gate    |
    ranks                   |    0    |    1    |    2    | 3 |      ⌈rows/4⌉ each; the last may have less, or none
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
from trinity.optim.dtensor import local_tensor, replicas, spread
from trinity.optim.newton_schulz import newton_schulz_flops

Window = tuple[slice, slice]  # which rows and columns of a matrix a rank holds; maybe none


class MatrixRun(NamedTuple):
    """Successive matrices of one parameter, or this rank's part of one, as they lie in its memory.

    first, count: which matrices of the stack that the local tensor is. rows: which rows of it.
    """

    role: Role
    first: int
    count: int
    rows: slice

    def of(self, x: Tensor) -> Tensor:
        """[count, rows, n], a view of the local part of a tensor that is placed as the parameter."""
        x = local_tensor(x)
        return x.view(x.shape[:-2].numel(), *x.shape[-2:])[self.first : self.first + self.count, self.rows]


class Matrix(NamedTuple):
    """A matrix of `shape`: what this rank holds of it, and each rank's window on it (one window if it is whole)."""

    shape: tuple[int, int]
    run: MatrixRun
    windows: list[Window]


class Travel(NamedTuple):
    """How a batch gets to its owners.

    group: the ranks it is spread over. owned: how many of its matrices this rank owns.
    windows: (which of those, window) in the order in which parts come: by rank.
    sent, received: elements to and from each rank; on the way back it is the other way round.
    """

    group: ProcessGroup
    owned: int
    windows: list[tuple[int, Window]]
    sent: list[int]
    received: list[int]


class MatrixBatch(NamedTuple):
    """Matrices of one shape [m, n]: what this rank holds of them, in the order in which it leaves for the owners.

    replicas: the ranks that hold the same, None if there are none. travel: None where the matrices are whole.
    """

    shape: tuple[int, int]
    held: list[MatrixRun]
    replicas: ProcessGroup | None
    travel: Travel | None


def lay_out(roles: list[Role], most_bytes: int) -> list[MatrixBatch]:
    """The batches of a step, those that travel in turn with those that do not; in the same order on all ranks.

    Args:
        most_bytes: of matrices (in the momentum's dtype) in a batch on one owner, unless a single matrix is larger; its
            number of matrices is rounded up to a multiple of the copies of the model, which may share them.
    """
    alike: dict[tuple, list[Matrix]] = defaultdict(list)
    for role in roles:
        itemsize = torch.promote_types(role.parameter.dtype, torch.float32).itemsize
        key = spread(role.parameter).group, replicas(role.parameter), itemsize
        alike[key] += _matrices(role)
    staying, travelling = [], []
    for (group, copies, itemsize), matrices in alike.items():
        sharers = copies.size() if copies else 1
        for by_owner in _deal(matrices, group.size() if group else 1, most_bytes // itemsize, sharers):
            batch = [matrix for own in by_owner for matrix in own]
            travel = group and _travel(by_owner, group)
            (travelling if travel else staying).append(MatrixBatch(batch[0].shape, _join(batch), copies, travel))
    return [batch for pair in zip_longest(travelling, staying) for batch in pair if batch]


def assign_owners(costs: Sequence[float], ranks: int) -> list[int]:
    """The owner of each job: the longest first, each to the rank with the least so far, of equals the first."""
    owners, loads = [0] * len(costs), [0.0] * ranks
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        owners[job] = loads.index(min(loads))
        loads[owners[job]] += costs[job]
    return owners


def windows(first: int, rows: int, size: tuple[int, int], dim: int, ranks: int) -> list[Window]:
    """Each rank's window on the matrix in rows first … first+rows of a parameter of this size, cut along `dim`."""
    chunk = -(-size[dim] // ranks)
    ends = [min(rank * chunk, size[dim]) for rank in range(ranks + 1)]
    if dim == -1:
        return [(slice(0, rows), slice(*end)) for end in pairwise(ends)]
    inside = [min(max(end - first, 0), rows) for end in ends]
    return [(slice(*end), slice(0, size[-1])) for end in pairwise(inside)]


def _matrices(role: Role) -> Iterator[Matrix]:
    """All matrices of a parameter that this rank holds or that are spread over it and others."""
    cut, held = spread(role.parameter), local_tensor(role.parameter)
    *_, m, n = role.parameter.shape
    top = 0  # in this rank's memory its parts of the pieces follow one another
    for first, rows in zip(accumulate(role.rows, initial=0), role.rows):
        everyones = windows(first, rows, (m, n), cut.dim, cut.ranks)
        mine = everyones[cut.rank][0]
        bottom = top + mine.stop - mine.start
        for index in range(held.shape[:-2].numel()):
            yield Matrix((rows, n), MatrixRun(role, index, 1, slice(top, bottom)), everyones)
        top = bottom
    assert top == held.shape[-2], f"{role.name}: {held.shape[-2]} rows on a rank that should hold {top}"


def _deal(matrices: list[Matrix], ranks: int, elements: int, sharers: int) -> Iterator[list[list[Matrix]]]:
    """Each matrix to an owner, then those of one shape in batches: lists by owner, of about `elements` each at most."""
    by_shape: dict[tuple[int, int], list[list[Matrix]]] = {}
    owners = assign_owners([newton_schulz_flops(*matrix.shape, steps=1) for matrix in matrices], ranks)
    for matrix, owner in zip(matrices, owners):
        by_shape.setdefault(matrix.shape, [[] for _ in range(ranks)])[owner].append(matrix)
    for shape, by_owner in by_shape.items():
        most = max(1, elements // math.prod(shape))
        most = -(-most // sharers) * sharers
        for first in range(0, max(map(len, by_owner)), most):
            yield [own[first : first + most] for own in by_owner]


def _travel(by_owner: list[list[Matrix]], group: ProcessGroup) -> Travel:
    def elements(matrices: list[Matrix], rank: int) -> int:
        return sum(math.prod(side.stop - side.start for side in matrix.windows[rank]) for matrix in matrices)

    me, ranks = group.rank(), range(group.size())
    arriving = [(place, matrix.windows[rank]) for rank in ranks for place, matrix in enumerate(by_owner[me])]
    sent = [elements(own, me) for own in by_owner]
    return Travel(group, len(by_owner[me]), arriving, sent, [elements(by_owner[me], rank) for rank in ranks])


def _join(batch: list[Matrix]) -> list[MatrixRun]:
    """What this rank holds of a batch, as few runs as it makes: thousands of experts in a stack are one."""
    runs: list[MatrixRun] = []
    for _, run, _ in batch:
        last = runs[-1] if runs else None
        if last and last._replace(first=run.first, count=1) == run and last.first + last.count == run.first:
            runs[-1] = last._replace(count=last.count + 1)
        else:
            runs.append(run)
    return runs
