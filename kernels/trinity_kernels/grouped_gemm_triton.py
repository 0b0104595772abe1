"""Grouped matrix products in Triton: each expert's rows times its weight, and each expert's weight gradient.

    rows × weights   out[r] = rows[r]·W_e or rows[r]·W_eᵀ, e the expert of row r
    outer products   out[e] = Σ over the rows r of e of left[r] ⊗ right[r], stored, or added to an existing gradient

Rows are sorted by expert. A table on the device (trinity_kernels.grouping.tile_table) names expert and rows of each
tile of BLOCK_M rows, the fullest experts first. So the host does not need the experts' row counts: the grid has the
length of the longest possible table, and programs of unused entries return at once. Neighbouring programs share a tile
of rows and read neighbouring columns of one weight, so both are read from the L2 cache.

Operands with contiguous rows are read by TMA through descriptors made on the host. A tile that extends past its expert
reads the next expert's rows (zeros past the end); these are multiplied by zero, or their results are not stored.
Gathered rows are read through pointers: Hopper's TMA cannot gather.

Shapes: R rows, E experts, M and N an output's rows and columns, K the length of the sums.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trinity_kernels.grouping import tile_table
from trinity_kernels.language import TensorDescriptor, cdiv, tl, triton


class Tile(NamedTuple):
    """Launch configuration of one kernel: block sizes, warps, pipeline stages, and parts of the epilogue."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    parts: int = 1

    def options(self) -> dict[str, int]:
        """The launch options, all but `parts`."""
        return {
            "BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip


# fp32 is for tests and small models: its products are exact and use no tensor core
WIDE = Tile(64, 32, 32, 4, 2)


def matmul_tile(columns: int, depth: int, dtype: torch.dtype) -> Tile:
    """Tile of rows × weights with N columns and sums of K terms."""
    if dtype == torch.float32:
        return WIDE
    if depth <= 512:  # Nano: short sums, so two blocks per multiprocessor hide each other's prologue and epilogue
        return Tile(128, 128, 64, 4, 3)
    return Tile(128, 256, 64, 8, 3)


def outer_tile(rows: int, columns: int, dtype: torch.dtype) -> Tile:
    """Tile of outer products [M, N]."""
    if dtype == torch.float32:
        return WIDE
    if min(rows, columns) <= 256:
        return Tile(128, 128, 64, 4, 3)
    return Tile(128, 256, 64, 8, 3)


def matmul(rows_RK: Tensor, weight: Tensor, ends_E: Tensor, transpose: bool) -> Tensor:
    """Each expert's rows times its weight.

    Args:
        rows_RK: [R, K] contiguous, sorted by expert.
        weight: [E, N, K] contiguous with transpose, else [E, K, N]; rows of a multiple of 16 bytes.
        ends_E: [E] int32, the row after each expert's last; rows past the last expert's are not computed.
    Returns:
        [R, N], same dtype.
    """
    R, K = rows_RK.shape
    N = weight.shape[1 if transpose else 2]
    out_RN = rows_RK.new_empty(R, N)
    if not R:
        return out_RN
    tile = matmul_tile(N, K, rows_RK.dtype)
    tiles = tile_table.triton(ends_E, R, tile.m)
    blocks = [tile.n, tile.k] if transpose else [tile.k, tile.n]
    grid = (len(tiles) * cdiv(N, tile.n),)
    rows_times_weights[grid](
        TensorDescriptor.from_tensor(rows_RK, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(weight.flatten(0, 1), blocks),
        out_RN, tiles, N, K, TRANSPOSE=transpose, PRECISION=precision(rows_RK.dtype), **tile.options(),
    )  # fmt: skip
    return out_RN


def outer(
    left_RM: Tensor,
    right_RN: Tensor,
    ends_E: Tensor,
    order_R: Tensor | None = None,
    active: int = 1,
    gathered: str = "",
    into: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Σ over each expert's rows of left ⊗ right.

    Args:
        left_RM, right_RN: [R, M] and [R, N] contiguous, sorted by expert; the one named by `gathered` ("left" or
            "right") is [T, ...] instead, and row r takes its row order_R[r] // active.
        ends_E: [E] int32. into: [E, M, N] contiguous, fp32: the result is added to it. None: a new tensor of `dtype`,
        by default the rows'.
    Returns:
        [E, M, N]; zeros (or `into` unchanged) for an expert without rows.
    """
    M, N, E = left_RM.shape[1], right_RN.shape[1], len(ends_E)
    out = left_RM.new_empty(E, M, N, dtype=dtype) if into is None else into
    rows = len(right_RN if gathered == "left" else left_RM)
    if not rows:
        return out.zero_() if into is None else out
    tile = outer_tile(M, N, left_RM.dtype)
    grid = (E * cdiv(M, tile.m) * cdiv(N, tile.n),)
    outer_products[grid](
        left_RM if gathered == "left" else TensorDescriptor.from_tensor(left_RM, [tile.k, tile.m]),
        right_RN if gathered == "right" else TensorDescriptor.from_tensor(right_RN, [tile.k, tile.n]),
        out, ends_E, fullest_first(ends_E), ends_E if order_R is None else order_R, M, N, active,
        LEFT_GATHERED=gathered == "left", RIGHT_GATHERED=gathered == "right", ADD=into is not None,
        PRECISION=precision(left_RM.dtype), **tile.options(),
    )  # fmt: skip
    return out


def fullest_first(ends_E: Tensor) -> Tensor:
    """Experts by descending number of rows [E] int32, so that the longest sums do not start last."""
    return ends_E.diff(prepend=ends_E.new_zeros(1)).sort(descending=True, stable=True).indices.to(torch.int32)


def precision(dtype: torch.dtype) -> str:
    """input_precision of tl.dot: exact products in fp32; products of 16-bit numbers are exact anyway."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def rows_times_weights(
    rows, weight, out, tiles, N, K,
    TRANSPOSE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of rows × weights: [BLOCK_M, BLOCK_N] of the output."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    entry = tiles + 3 * (tl.program_id(0) // blocks_n)
    n = (tl.program_id(0) % blocks_n) * BLOCK_N
    expert, first, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    if expert < 0:
        return
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        left = rows.load([first, k])
        if TRANSPOSE:
            right = weight.load([expert * N + n, k]).T
        else:
            right = weight.load([expert * K + k, n])
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    row = first + tl.arange(0, BLOCK_M)
    column = n + tl.arange(0, BLOCK_N)
    inside = (row < end)[:, None] & (column < N)[None, :]
    place = out + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def outer_products(
    left, right, out, ends, experts, order, M, N, active,
    LEFT_GATHERED: tl.constexpr, RIGHT_GATHERED: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of an expert's weight gradient: [BLOCK_M, BLOCK_N]."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks = tl.cdiv(M, BLOCK_M) * blocks_n
    expert = tl.load(experts + tl.program_id(0) // blocks)
    m = (tl.program_id(0) % blocks // blocks_n) * BLOCK_M
    n = (tl.program_id(0) % blocks_n) * BLOCK_N
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    whole = start + (end - start) // BLOCK_K * BLOCK_K
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in range(start, whole, BLOCK_K):
        a = _rows(left, order, active, row, end, m, M, LEFT_GATHERED, False, BLOCK_K, BLOCK_M)
        b = _rows(right, order, active, row, end, n, N, RIGHT_GATHERED, False, BLOCK_K, BLOCK_N)
        sums = tl.dot(a.T, b, sums, input_precision=PRECISION)
    if whole < end:  # outside the loop, because masking a tile read by TMA moves it through registers
        a = _rows(left, order, active, whole, end, m, M, LEFT_GATHERED, True, BLOCK_K, BLOCK_M)
        b = _rows(right, order, active, whole, end, n, N, RIGHT_GATHERED, True, BLOCK_K, BLOCK_N)
        sums = tl.dot(a.T, b, sums, input_precision=PRECISION)
    out += expert.to(tl.int64) * M * N
    if ADD:  # in quarters: the existing gradient would take as many registers as the sums
        left_half, right_half = halves(sums, BLOCK_M, BLOCK_N)
        WIDTH: tl.constexpr = BLOCK_N // 4
        one, two = halves(left_half, BLOCK_M, BLOCK_N // 2)
        _store_tile(one, out, m, n, M, N, True, BLOCK_M, WIDTH)
        _store_tile(two, out, m, n + WIDTH, M, N, True, BLOCK_M, WIDTH)
        three, four = halves(right_half, BLOCK_M, BLOCK_N // 2)
        _store_tile(three, out, m, n + 2 * WIDTH, M, N, True, BLOCK_M, WIDTH)
        _store_tile(four, out, m, n + 3 * WIDTH, M, N, True, BLOCK_M, WIDTH)
    else:
        _store_tile(sums, out, m, n, M, N, False, BLOCK_M, BLOCK_N)


@triton.jit
def _store_tile(tile, out, m, n, M, N, ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store a tile at (m, n) of out [M, N]; with ADD, add it to the values there."""
    row = m + tl.arange(0, ROWS)
    column = n + tl.arange(0, COLUMNS)
    inside = (row < M)[:, None] & (column < N)[None, :]
    place = out + row.to(tl.int64)[:, None] * N + column[None, :]
    if ADD:
        tile += tl.load(place, mask=inside, other=0.0)
    tl.store(place, tile.to(out.dtype.element_ty), mask=inside)


@triton.jit
def halves(x, M: tl.constexpr, N: tl.constexpr):
    """The left and the right half of the columns of x [M, N]."""
    return tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _rows(
    source, order, active, row, end, column, width,
    GATHERED: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile [ROWS, COLUMNS] of consecutive sorted rows; in the LAST tile, rows from `end` on are zeros."""
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    if GATHERED:
        token = tl.load(order + rows, mask=rows < end, other=0) // active
        place = source + token.to(tl.int64)[:, None] * width + columns[None, :]
        tile = tl.load(place, mask=(columns < width)[None, :], other=0.0)
    else:
        tile = source.load([row, column])
    if LAST:
        tile = tl.where((rows < end)[:, None], tile, 0.0).to(tile.dtype)
    return tile
