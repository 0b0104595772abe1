"""Newton-Schulz in Triton: only half the tiles of symmetric products are computed; flat matrices take a Gram form.

plain form, a step   G = XXᵀ;  Z = bG + cG²;  X ← aX + ZX          (a tall X: G = XᵀX and X ← aX + XZ)
Gram form, two steps G = XXᵀ;  P = aI + bG + cG²;  G ← PGP;  P' = a'I + b'G + c'G²;  X ← (P'P)X

All k × k matrices are polynomials of one XXᵀ: they commute and are symmetric. `symmetric_kernel` computes the tiles on
and below the diagonal and stores each tile below it a second time, transposed; in tiles on the diagonal it mirrors the
lower half. So every result is symmetric to the last bit, and a second operand may be read as its own transpose.

Why the Gram form recomputes G from X after two steps. G is updated without X, so its rounding error e grows: where G's
true eigenvalue is near 0, an update turns e into a²·e, and |b|·a²·e is added to the next factor a. One update in fp16
(e = 2⁻¹², a ≤ 8.3) changes the factor by about 1 %. A second one multiplies that by another a², up to 16: the
eigenvalue may then be -0.1, and further steps diverge. The k × k matrices are in fp16, because bf16 would be 8 times
coarser; none of their numbers exceeds 100. X itself stays in the input's dtype for the first two steps and is in fp16
after them; the last product is rounded to the input's dtype. Simulations of these roundings over 28 spectra, five sizes
from 16×64 to 512×1024 and all three sets of triples gave how far singular values leave the bounds of
trinity.optim.newton_schulz (0.02 is allowed): 0.004 in this form, 0.011 in the plain form in bf16. With a fresh G after
2 and then 3 steps it was 0.026, after 3 and then 2 it was 0.3; with k × k matrices in bf16 it was more than 100, and
without a fresh G NaN.

Operands and results use TMA, through descriptors [N, rows, columns] made on the host: reads past a matrix give 0,
whatever follows in memory, and writes past it are dropped.

Shapes: N matrices, X of m rows and n columns, k the shorter side, l the longer.
"""

import torch
from torch import Tensor

from trinity_kernels.grouped_gemm_triton import Tile, precision
from trinity_kernels.language import TensorDescriptor, cdiv, tl, triton
from trinity_kernels.newton_schulz import Triple


def flat(rows: int, columns: int) -> bool:
    """Whether a matrix takes the Gram form: l ≥ 2k.

    Flops of five steps, with half the tiles of symmetric products in the two lower rows (k of many tiles):
    reference          5·(4k²l + 2k³)        l = 4k: 90 k³   l = 2k: 50 k³   l = k: 30 k³
    plain form here    5·(3k²l + k³)                 65 k³           35 k³          20 k³
    Gram form          3·3k²l + 11k³                 47 k³           29 k³          20 k³
    With h the share of tiles computed, the Gram form has fewer flops if l > 3hk/(1 + h): between k (h = ½) and 1.5k
    (h = 1).
    """
    k, long = sorted((rows, columns))
    return long >= 2 * k


def symmetric_tile(side: int, dtype: torch.dtype) -> Tile:
    """Tile of k × k results; it must be square."""
    if dtype == torch.float32:
        return Tile(32, 32, 32, 4, 2)
    if side <= 512:  # short sums, or few tiles: two blocks per multiprocessor hide each other's latency
        return Tile(128, 128, 64, 4, 3)
    return Tile(128, 128, 64, 8, 4)


def times_tile(depth: int, dtype: torch.dtype) -> Tile:
    """Tile of a k × k matrix times X."""
    if dtype == torch.float32:
        return Tile(64, 32, 32, 4, 2)
    if depth <= 512:
        return Tile(128, 128, 64, 4, 3)
    return Tile(128, 256, 64, 8, 3)


def newton_schulz(y_Nmn: Tensor, triples: list[Triple]) -> Tensor:
    """See trinity_kernels.newton_schulz."""
    return newton_schulz_op(y_Nmn, [number for triple in triples for number in triple])


@torch.library.custom_op("trinity::newton_schulz", mutates_args=())
def newton_schulz_op(y_Nmn: Tensor, coefficients: list[float]) -> Tensor:
    """The iteration as one op, which compile and fake tensors do not look into; a, b, c of each step in a row."""
    triples = list(zip(coefficients[0::3], coefficients[1::3], coefficients[2::3]))
    if not (triples and y_Nmn.numel()):
        return y_Nmn.clone(memory_format=torch.contiguous_format)
    form = gram_form if flat(*y_Nmn.shape[1:]) else plain_form
    return form(y_Nmn.contiguous(), triples)


@newton_schulz_op.register_fake
def _(y_Nmn: Tensor, coefficients: list[float]) -> Tensor:
    return y_Nmn.new_empty(y_Nmn.shape)


def plain_form(x_Nmn: Tensor, triples: list[Triple]) -> Tensor:
    """The reference's steps, all in x's dtype; at least one triple."""
    for a, b, c in triples:
        z_Nkk = polynomial(gram(x_Nmn, x_Nmn.dtype), (0.0, b, c), x_Nmn.dtype)
        x_Nmn = times(z_Nkk, x_Nmn, x_Nmn.dtype, a)
    return x_Nmn


def gram_form(x_Nmn: Tensor, triples: list[Triple]) -> Tensor:
    """Two steps at a time on XXᵀ, then their product times X; at least one triple, any shape and dtype."""
    dtype = x_Nmn.dtype
    fine = torch.float16 if dtype == torch.bfloat16 else dtype
    for start in range(0, len(triples), 2):
        pair = triples[start : start + 2]
        g_Nkk = gram(x_Nmn, fine)
        # the factor of X has X's dtype, because both operands of a tensor-core instruction must
        if len(pair) == 2:
            p_Nkk = polynomial(g_Nkk, pair[0], fine)
            g_Nkk = symmetric(symmetric(p_Nkk, g_Nkk, fine), p_Nkk, fine)
            p_Nkk = symmetric(polynomial(g_Nkk, pair[1], fine), p_Nkk, x_Nmn.dtype)
        else:
            p_Nkk = polynomial(g_Nkk, pair[0], x_Nmn.dtype)
        x_Nmn = times(p_Nkk, x_Nmn, dtype if start + 2 >= len(triples) else fine)
    return x_Nmn


def gram(x_Nmn: Tensor, dtype: torch.dtype) -> Tensor:
    """XXᵀ, or XᵀX if X is tall: [N, k, k], rounded to dtype."""
    return _symmetric(x_Nmn, x_Nmn, dtype, tall=x_Nmn.shape[1] > x_Nmn.shape[2])


def polynomial(g_Nkk: Tensor, triple: Triple, dtype: torch.dtype) -> Tensor:
    """aI + bG + cG² of a symmetric G; c is not 0."""
    return _symmetric(g_Nkk, g_Nkk, dtype, triple=triple)


def symmetric(left_Nkk: Tensor, right_Nkk: Tensor, dtype: torch.dtype) -> Tensor:
    """left·right of two symmetric matrices that commute; the product is symmetric too."""
    return _symmetric(left_Nkk, right_Nkk, dtype)


def times(z_Nkk: Tensor, x_Nmn: Tensor, dtype: torch.dtype, a: float | None = None) -> Tensor:
    """ZX, or XZ if X is tall, plus aX if a is given: [N, m, n], rounded to dtype."""
    N, m, n = x_Nmn.shape
    k = min(m, n)
    tile = times_tile(k, x_Nmn.dtype)
    out_Nmn = x_Nmn.new_empty(N, m, n, dtype=dtype)
    left, right = (x_Nmn, z_Nkk) if m > n else (z_Nkk, x_Nmn)
    times_kernel[(N * cdiv(m, tile.m) * cdiv(n, tile.n),)](
        _tiles(left, tile.m, tile.k), _tiles(right, tile.k, tile.n), _tiles(x_Nmn, tile.m, tile.n),
        _tiles(out_Nmn, tile.m, tile.n), m, n, k, 0.0 if a is None else a,
        ADD=a is not None, PRECISION=precision(x_Nmn.dtype), **tile.options(),
    )  # fmt: skip
    return out_Nmn


def _symmetric(
    left: Tensor, right: Tensor, dtype: torch.dtype, tall: bool = False, triple: Triple | None = None
) -> Tensor:
    """left·rightᵀ, or leftᵀ·right if tall; with a triple, aI + b·left + c·left·rightᵀ."""
    N, k, depth = (left.shape[i] for i in ((0, 2, 1) if tall else (0, 1, 2)))
    tile = symmetric_tile(k, left.dtype)
    out_Nkk = left.new_empty(N, k, k, dtype=dtype)
    a, b, c = triple or (0.0, 0.0, 1.0)
    sizes = (tile.k, tile.m) if tall else (tile.m, tile.k)
    symmetric_kernel[(N * cdiv(k, tile.m) ** 2,)](
        _tiles(left, *sizes), _tiles(right, *sizes), _tiles(left, tile.m, tile.m), _tiles(out_Nkk, tile.m, tile.m),
        k, depth, a / c, b / c, c,
        TALL=tall, POLYNOMIAL=triple is not None, PRECISION=precision(left.dtype),
        BLOCK_M=tile.m, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out_Nkk


def _tiles(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Descriptor of [N, rows, columns] whose tiles are in one matrix each."""
    return TensorDescriptor.from_tensor(x, [1, rows, columns])


@triton.jit
def symmetric_kernel(
    left, right, add, out, side, depth, a_over_c, b_over_c, c,
    TALL: tl.constexpr, POLYNOMIAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile on or below the diagonal, stored there and transposed above; programs above the diagonal do nothing."""
    blocks = tl.cdiv(side, BLOCK_M)
    batch = tl.program_id(0) // (blocks * blocks)
    m = (tl.program_id(0) // blocks % blocks) * BLOCK_M
    n = (tl.program_id(0) % blocks) * BLOCK_M
    if n > m:
        return
    row = m + tl.arange(0, BLOCK_M)[:, None]
    column = n + tl.arange(0, BLOCK_M)[None, :]
    if POLYNOMIAL:
        # added before the products, hence divided by c: added after them, it would need registers besides the sums
        sums = b_over_c * add.load([batch, m, n]).reshape(BLOCK_M, BLOCK_M).to(tl.float32)
        sums += tl.where(row == column, a_over_c, 0.0)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for k in range(0, depth, BLOCK_K):
        if TALL:
            x = left.load([batch, k, m]).reshape(BLOCK_K, BLOCK_M).T
            y = right.load([batch, k, n]).reshape(BLOCK_K, BLOCK_M)
        else:
            x = left.load([batch, m, k]).reshape(BLOCK_M, BLOCK_K)
            y = right.load([batch, n, k]).reshape(BLOCK_M, BLOCK_K).T
        sums = tl.dot(x, y, sums, input_precision=PRECISION)
    if POLYNOMIAL:
        sums *= c
    tile = sums.to(out.dtype)
    flipped = tile.T
    # on the diagonal two mirrored elements may be summed in different orders: one is used for both
    tile = tl.where(row >= column, tile, flipped)
    out.store([batch, m, n], tile.reshape(1, BLOCK_M, BLOCK_M))
    if m != n:
        out.store([batch, n, m], flipped.reshape(1, BLOCK_M, BLOCK_M))


@triton.jit
def times_kernel(
    left, right, add, out, rows, columns, depth, a,
    ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of left·right; with ADD, plus a times the same tile of `add`."""
    blocks_m, blocks_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    batch = tl.program_id(0) // (blocks_m * blocks_n)
    m = (tl.program_id(0) // blocks_n % blocks_m) * BLOCK_M
    n = (tl.program_id(0) % blocks_n) * BLOCK_N
    if ADD:  # before the products, as above
        sums = a * add.load([batch, m, n]).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        x = left.load([batch, m, k]).reshape(BLOCK_M, BLOCK_K)
        y = right.load([batch, k, n]).reshape(BLOCK_K, BLOCK_N)
        sums = tl.dot(x, y, sums, input_precision=PRECISION)
    out.store([batch, m, n], sums.to(out.dtype).reshape(1, BLOCK_M, BLOCK_N))
