"""Grouping of rows by expert in Triton: a stable counting sort, integers only, without atomics.

    1. rank_kernel: within each block of choices, a choice's rank among the earlier choices of the same expert, by
       comparing all pairs; the last choice of an expert writes the count
    2. torch's cumulative sum over all counts, expert by expert and block by block: each element is the row after the
       block's last choice of that expert
    3. place_kernel: place = the cumulative sum before + rank; the inverse permutation is written as well

Shapes: T tokens, K active experts, E experts, R rows, B blocks.
"""

import torch
from torch import Tensor

from trinity_kernels.grouping import Groups, table_length
from trinity_kernels.language import cdiv, next_power_of_2, tl, triton

BLOCK = 128
"""Choices per program: 16384 pairs, 128 per thread."""


def group_rows(indices_TK: Tensor, experts: int, rows: int) -> Groups:
    """See trinity_kernels.group_rows."""
    choices = indices_TK.numel()
    order_R = torch.empty(rows, dtype=torch.int32, device=indices_TK.device)
    place_TK = torch.empty_like(indices_TK, dtype=torch.int32)
    if not choices:
        return Groups(order_R, place_TK, order_R.new_zeros(experts))
    blocks = cdiv(choices, BLOCK)
    counts_EB = torch.zeros(experts, blocks, dtype=torch.int32, device=indices_TK.device)
    indices_TK = indices_TK.contiguous()
    rank_kernel[(blocks,)](indices_TK, place_TK, counts_EB, choices, blocks, BLOCK=BLOCK, num_warps=4)
    # flattened, because along the outer of two dimensions torch uses one thread per column on a GPU
    ends_EB = counts_EB.flatten().cumsum(0, dtype=torch.int32)
    place_kernel[(blocks,)](indices_TK, place_TK, ends_EB, order_R, choices, blocks, BLOCK=BLOCK, num_warps=4)
    return Groups(order_R, place_TK, ends_EB.view(experts, blocks)[:, -1].contiguous())


def tile_table(ends_E: Tensor, rows: int, block: int) -> Tensor:
    """See trinity_kernels.tile_table."""
    experts = len(ends_E)
    table = torch.empty(table_length(rows, block, experts), 3, dtype=torch.int32, device=ends_E.device)
    experts_block = next_power_of_2(experts)
    table_kernel[(experts + 1,)](ends_E, table, experts, len(table), block, EXPERTS=experts_block, num_warps=4)
    return table


@triton.jit
def rank_kernel(indices, ranks, counts, choices, blocks, BLOCK: tl.constexpr):
    """Each choice's rank within its block and expert, and the block's count of each expert that occurs in it."""
    mine = tl.arange(0, BLOCK)
    choice = tl.program_id(0) * BLOCK + mine
    expert = tl.load(indices + choice, mask=choice < choices, other=-1).to(tl.int32)
    # the same numbers along the other dimension
    other = tl.program_id(0) * BLOCK + mine
    other_expert = tl.load(indices + other, mask=other < choices, other=-1).to(tl.int32)
    same = expert[:, None] == other_expert[None, :]
    rank = tl.sum((same & (mine[None, :] < mine[:, None])).to(tl.int32), axis=1)
    later = tl.sum((same & (mine[None, :] > mine[:, None])).to(tl.int32), axis=1)
    tl.store(ranks + choice, rank, mask=choice < choices)
    place = expert.to(tl.int64) * blocks + tl.program_id(0)
    tl.store(counts + place, rank + 1, mask=(expert >= 0) & (later == 0))


@triton.jit
def place_kernel(indices, places, ends, order, choices, blocks, BLOCK: tl.constexpr):
    """Turn ranks into rows, in place, and write the choice of each row."""
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = choice < choices
    expert = tl.load(indices + choice, mask=there, other=-1).to(tl.int32)
    here = expert >= 0
    before = expert.to(tl.int64) * blocks + tl.program_id(0) - 1
    start = tl.load(ends + before, mask=here & (before >= 0), other=0)
    place = start + tl.load(places + choice, mask=here, other=0)
    tl.store(places + choice, tl.where(here, place, -1), mask=there)
    tl.store(order + place, choice, mask=here)


@triton.jit
def table_kernel(ends, table, experts, length, block, EXPERTS: tl.constexpr):
    """One expert's tiles, each after those of all fuller experts; the last program marks the unused entries."""
    expert = tl.program_id(0)
    other = tl.arange(0, EXPERTS)
    end = tl.load(ends + other, mask=other < experts, other=0)
    start = tl.load(ends + other - 1, mask=(other > 0) & (other < experts), other=0)
    sizes = end - start
    tiles = (sizes + block - 1) // block
    lane = tl.arange(0, 128)
    if expert == experts:
        for entry in range(tl.sum(tiles), length, 128):
            place = table + 3 * (entry + lane)
            unused = entry + lane < length
            tl.store(place, -1, mask=unused)
            tl.store(place + 1, -1, mask=unused)
            tl.store(place + 2, -1, mask=unused)
    else:
        own_end = tl.load(ends + expert)
        own_start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
        size = own_end - own_start
        count = (size + block - 1) // block
        first = tl.sum(tl.where((sizes > size) | ((sizes == size) & (other < expert)), tiles, 0))
        for tile in range(0, count, 128):
            place = table + 3 * (first + tile + lane)
            used = tile + lane < count
            tl.store(place, expert, mask=used)
            tl.store(place + 1, own_start + (tile + lane) * block, mask=used)
            tl.store(place + 2, own_end, mask=used)
