"""Rows grouped by expert, and the table of tiles that grouped products work through.

A choice is one of a token's K experts, numbered t·K + k. Each choice that is computed here takes one row; rows stand by
expert, and within an expert in the order of the choices. All of it is integer arithmetic on the device: the host is
told nothing, and every shape follows from what the host knew before, so that a CUDA graph can hold it.

Shapes: T tokens, K active experts, E experts, R rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trinity_kernels.op import Op


class Groups(NamedTuple):
    """Where each choice's row is, and which choice each row is.

    order_R: [R] int32, the choice in each row.
    place_TK: [T, K] int32, the row of each choice; −1 for one that is not computed here.
    ends_E: [E] int32, the row after each expert's last.
    """

    order_R: Tensor
    place_TK: Tensor
    ends_E: Tensor


def _group_rows(indices_TK: Tensor, experts: int, rows: int) -> Groups:
    """Sort the choices by expert, those of −1 left out.

    Args:
        indices_TK: [T, K] int64, each in [0, E), or −1 for a choice that is not computed here.
        experts: E.
        rows: R, how many choices are not −1, exactly.
    """
    sorted_, order = indices_TK.flatten().sort(stable=True)
    nobody = order.numel() - rows  # they come first
    experts_E = torch.arange(experts, device=order.device)
    # not bincount, which waits for the device
    ends_E = torch.searchsorted(sorted_[nobody:], experts_E, right=True, out_int32=True)
    place = torch.full_like(order, -1, dtype=torch.int32)
    place[order[nobody:]] = torch.arange(rows, dtype=torch.int32, device=order.device)
    return Groups(order[nobody:].to(torch.int32), place.view_as(indices_TK), ends_E)


def _tile_table(ends_E: Tensor, rows: int, block: int) -> Tensor:
    """Cut each expert's rows in tiles, those of the fullest expert first, so that its many tiles do not start last.

    Args:
        ends_E: [E] int32, the row after each expert's last.
        rows: R, the last of them.
        block: rows of a tile; an expert's last tile may have fewer.
    Returns:
        [⌈R/block⌉ + E, 3] int32, contiguous: expert, first row, and the row after the expert's last. Experts of equal
        load in their order, an expert's tiles by row. Unused entries come last; their expert is −1.
    """
    sizes_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    sizes_E, expert_E = sizes_E.sort(descending=True, stable=True)
    tiles_E = (sizes_E + block - 1) // block
    after_E = tiles_E.cumsum(0)
    entry = torch.arange(table_length(rows, block, len(ends_E)), device=ends_E.device)
    which = torch.searchsorted(after_E, entry, right=True).clamp_max_(len(ends_E) - 1)
    expert = expert_E[which]
    end = ends_E[expert]
    first = end - sizes_E[which] + (entry - (after_E - tiles_E)[which]) * block
    table = torch.stack((expert, first, end), dim=1)
    # no tensor made of −1: copying it to the device would make the host wait
    return table.masked_fill_((entry >= after_E[-1]).unsqueeze(1), -1).to(torch.int32)


def table_length(rows: int, block: int, experts: int) -> int:
    """How many tiles there may be at the most: what the host knows without asking."""
    return -(-rows // block) + experts


group_rows = Op(_group_rows, "trinity_kernels.grouping_triton:group_rows")
tile_table = Op(_tile_table, "trinity_kernels.grouping_triton:tile_table")
