"""Exact order statistics of tensors that are read in blocks: the k largest values, quantiles.

A tensor of one block is partitioned by numpy. A larger one is counted: the bits of a float ≥ 0, read as an integer, are
in the order of the floats, so two histograms, of the upper 16 bits and of the lower 16 bits within one upper value,
find any order statistic exactly in two passes and 1 MB. Equal values are cut by their position: the first ones count as
larger. So a cut is stable: it depends on the values alone, not on a sort's order, on threads or on block sizes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from trinity.merging.inputs import BLOCK, Values

_ALL = 1 << 62
_LOW = 16


@dataclass(frozen=True)
class Cut:
    """The k largest of some values ≥ 0: those above `value`, and those equal to it up to the flat index `last`."""

    value: float
    last: int

    def above(self, values: Tensor, first: int) -> Tensor:
        """Boolean mask of the selected values of one block.

        Args:
            values: fp32, any shape.
            first: flat index of the block's first element.
        """
        if self.last == _ALL:
            return values >= self.value
        mask = values > self.value
        equal_before = self.last - first + 1
        if equal_before > 0:
            flat = mask.view(-1)[:equal_before]
            flat |= values.view(-1)[:equal_before] == self.value
        return mask


def largest(values: Values, k: int, count: int) -> Cut:
    """The cut that selects the k largest of `count` values; of equal ones the first."""
    if k >= count:
        return Cut(-1.0, _ALL)
    if k <= 0:
        return Cut(math.inf, -1)
    if count <= BLOCK:
        return _largest_in_memory(np.concatenate([block.numpy().reshape(-1) for _, block in values()]), k)
    (value,) = smallest_at(values, [count - k], count)
    above = sum(int(torch.count_nonzero(block > value)) for _, block in values())
    missing = k - above
    for first, block in values():
        positions = (block.reshape(-1) == value).nonzero().view(-1)
        if len(positions) >= missing:
            return Cut(value, first + int(positions[missing - 1]))
        missing -= len(positions)
    raise AssertionError("fewer equal values than were counted")


def _largest_in_memory(values: np.ndarray, k: int) -> Cut:
    value = np.partition(values, len(values) - k)[len(values) - k]
    missing = k - int(np.count_nonzero(values > value))
    equal = np.flatnonzero(values == value)
    return Cut(float(value), _ALL if missing == len(equal) else int(equal[missing - 1]))


def smallest_at(values: Values, ranks: list[int], count: int) -> list[float]:
    """The values at 0-based ranks of the ascending order, exactly.

    Args:
        values: fp32, ≥ 0, finite.
        ranks: each in 0 … count - 1.
        count: number of values.
    """
    if count <= BLOCK:
        copy = torch.cat([block.reshape(-1) for _, block in values()]).numpy()
        copy = np.partition(copy, ranks)
        return [float(copy[rank]) for rank in ranks]
    upper = torch.zeros(1 << (31 - _LOW), dtype=torch.int64)
    for bits in _bits(values):
        upper += torch.bincount(bits >> _LOW, minlength=len(upper))
    ends = upper.cumsum(0)
    buckets = [int(torch.searchsorted(ends, rank, right=True)) for rank in ranks]
    lower = {bucket: torch.zeros(1 << _LOW, dtype=torch.int64) for bucket in buckets}
    for bits in _bits(values):
        for bucket, counts in lower.items():
            inside = bits[bits >> _LOW == bucket]
            counts += torch.bincount(inside & ((1 << _LOW) - 1), minlength=len(counts))
    found = []
    for rank, bucket in zip(ranks, buckets):
        before = int(ends[bucket] - upper[bucket])
        low = int(torch.searchsorted(lower[bucket].cumsum(0), rank - before, right=True))
        found.append(torch.tensor(bucket << _LOW | low, dtype=torch.int32).view(torch.float32).item())
    return found


def quantiles(values: Values, shares: list[float], count: int) -> list[float]:
    """Quantiles with linear interpolation between neighbouring values."""
    positions = [share * (count - 1) for share in shares]
    ranks = list(chain.from_iterable((math.floor(at), math.ceil(at)) for at in positions))
    found = smallest_at(values, ranks, count)
    return [low + (high - low) * (at - math.floor(at)) for at, low, high in zip(positions, found[::2], found[1::2])]


def _bits(values: Values) -> Iterator[Tensor]:
    return (block.reshape(-1).view(torch.int32) for _, block in values())
