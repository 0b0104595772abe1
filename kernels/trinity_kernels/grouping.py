"""Grouping of rows by expert, and the table of tiles for grouped matrix products.

A choice is one of a token's K experts, numbered t·K + k. Each choice that is not −1 takes one row. Rows are sorted by
expert, and within an expert by choice. Everything is integer arithmetic on the device: the host does not wait, and all
shapes follow from numbers that the host knows, so a CUDA graph can capture it. Nothing is saved: there is no gradient.
Triton (grouping_triton.py): a counting sort in two kernels, in place of torch.sort.

Shapes: T tokens, K active experts, E experts, R rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trinity_kernels.op import Op


class Groups(NamedTuple):
    """The permutation between choices and rows.

    order_R: [R] int32, the choice in each row.
    place_TK: [T, K] int32, the row of each choice; −1 for a choice of −1.
    ends_E: [E] int32, the row after each expert's last.
    """

    order_R: Tensor
    place_TK: Tensor
    ends_E: Tensor


def _group_rows(indices_TK: Tensor, experts: int, rows: int) -> Groups:
    """Sort the choices by expert, without those of −1.

    Args:
        indices_TK: [T, K] int64, each in [0, E), or −1 for a choice that is not computed on this rank.
        experts: E.
        rows: R, the exact number of choices that are not −1.
    """
    sorted_, order = indices_TK.flatten().sort(stable=True)
    skipped = order.numel() - rows  # choices of −1, which are sorted first
    experts_E = torch.arange(experts, device=order.device)
    # not bincount, because that waits for the device
    ends_E = torch.searchsorted(sorted_[skipped:], experts_E, right=True, out_int32=True)
    place = torch.full_like(order, -1, dtype=torch.int32)
    place[order[skipped:]] = torch.arange(rows, dtype=torch.int32, device=order.device)
    return Groups(order[skipped:].to(torch.int32), place.view_as(indices_TK), ends_E)


def _tile_table(ends_E: Tensor, rows: int, block: int) -> Tensor:
    """Cut each expert's rows into tiles; the fullest expert comes first, so that its many tiles do not start last.

    Args:
        ends_E: [E] int32, the row after each expert's last.
        rows: R, the last of them.
        block: rows of a tile; an expert's last tile may have fewer.
    Returns:
        [⌈R/block⌉ + E, 3] int32, contiguous: expert, first row of the tile, and the row after the expert's last.
        Experts of equal load are in their order, an expert's tiles in the order of rows. Unused entries come last;
        expert −1.
    """
    sizes_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    sizes_E, expert_E = sizes_E.sort(descending=True, stable=True)
    tiles_E = (sizes_E + block - 1) // block
    after_E = tiles_E.cumsum(0)
    entry = torch.arange(table_length(rows, block, len(ends_E)), device=ends_E.device)
    group = torch.searchsorted(after_E, entry, right=True).clamp_max_(len(ends_E) - 1)
    expert = expert_E[group]
    end = ends_E[expert]
    first = end - sizes_E[group] + (entry - (after_E - tiles_E)[group]) * block
    table = torch.stack((expert, first, end), dim=1)
    # masked_fill_, not a tensor of −1, because copying one to the device would make the host wait
    return table.masked_fill_((entry >= after_E[-1]).unsqueeze(1), -1).to(torch.int32)


def table_length(rows: int, block: int, experts: int) -> int:
    """Upper bound on the number of tiles, from numbers that the host knows."""
    return -(-rows // block) + experts


group_rows = Op(_group_rows, "trinity_kernels.grouping_triton:group_rows")
tile_table = Op(_tile_table, "trinity_kernels.grouping_triton:tile_table")
