"""The experts in Triton against the float64 reference, which test_experts.py compares with loops.

Shapes: T tokens, D width, E experts, F expert width, K active experts.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.kernels.triton_case import BOUNDS, DEVICE, assert_close
from trinity_kernels import expert_mlp, experts_triton, grouped_gemm_triton
from trinity_kernels.grouped_gemm_triton import Tile

# E, K, T, D, F. Many experts are many programs, which the interpreter runs one by one: in fp32 only.
CASES = [
    (1, 1, 7, 16, 8), (1, 1, 64, 40, 24), (4, 4, 1, 40, 24), (4, 4, 63, 16, 32), (4, 1, 129, 40, 40),
    (4, 2, 65, 72, 24), (7, 3, 63, 24, 40), (4, 2, 0, 16, 8),
]  # fmt: skip
MANY = [
    (128, 8, 7, 16, 8),
    (256, 1, 1, 16, 8),
    *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((128, 8, 64, 40, 24), (256, 4, 65, 16, 16))),
]
WIDE_GRID = [
    (E, K, T, 40, 24) for E in (1, 4, 128, 256) for K in (1, 4, 8) if K <= E for T in (1, 7, 63, 64, 65, 129, 1000)
    if T < 129 or E <= 4
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, so that few rows fill and overflow them; the epilogue in two parts."""
    for module, name, tile in (
        (grouped_gemm_triton, "matmul_tile", Tile(16, 32, 16, 4, 2)),
        (grouped_gemm_triton, "outer_tile", Tile(32, 32, 16, 4, 2)),
        (experts_triton, "up_tile", Tile(16, 32, 16, 4, 2)),
        (experts_triton, "dpre_tile", Tile(16, 32, 16, 4, 2, parts=2)),
    ):
        monkeypatch.setattr(module, name, lambda *_, tile=tile: tile)


def make(E: int, K: int, T: int, D: int, F: int, dtype: torch.dtype) -> list[Tensor]:
    """x, gate_up, down, indices (distinct within a token) and gates; all but the indices require gradients."""
    random = torch.Generator().manual_seed(1000 * E + 100 * K + T)
    x_TD, s_TK = torch.randn(T, D, generator=random), torch.rand(T, K, generator=random)
    w1, w2 = torch.randn(E, 2, F, D, generator=random) / D**0.5, torch.randn(E, D, F, generator=random)
    indices_TK = torch.rand(T, E, generator=random).argsort(dim=1)[:, :K].to(DEVICE)
    tensors = [x_TD.to(dtype), w1.to(dtype), w2.to(dtype), indices_TK, s_TK]
    return [x.to(DEVICE).requires_grad_() if x.is_floating_point() else x for x in tensors]


def run(function: Callable[..., Tensor], inputs: list[Tensor], dy_TD: Tensor, **options: object) -> list[Tensor]:
    """Output and the gradients of x, gate_up, down and gates."""
    y_TD = function(*inputs, **options)
    return [y_TD.detach(), *torch.autograd.grad(y_TD, [x for x in inputs if x.requires_grad], dy_TD.to(y_TD.dtype))]


def to_float64(inputs: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs]


def compare(inputs: list[Tensor], dtype: torch.dtype, **options: object) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    dy_TD = torch.randn(inputs[0].shape, generator=random).to(DEVICE, dtype)
    rows = (inputs[3] >= 0).sum().item()
    got = run(expert_mlp.triton, inputs, dy_TD, rows=rows, **options)
    exact = run(expert_mlp.reference, to_float64(inputs), dy_TD, rows=rows)
    assert [x.dtype for x in got] == [dtype, dtype, dtype, dtype, torch.float32]
    for a, b in zip(got, exact):
        assert_close(a, b, BOUNDS[dtype])
    return got


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("sizes", CASES)
def test_matches_float64(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Output and every gradient."""
    compare(make(*sizes, dtype), dtype)


@pytest.mark.parametrize("sizes", MANY)
def test_many_experts_most_of_them_empty(sizes: tuple[int, ...]) -> None:
    compare(make(*sizes, torch.float32), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", WIDE_GRID)
def test_matches_float64_on_the_wide_grid(sizes: tuple[int, ...]) -> None:
    compare(make(*sizes, torch.float32), torch.float32)


@pytest.mark.parametrize("hot", [0, 3])
def test_all_tokens_on_one_expert(hot: int) -> None:
    """The gradients of the other experts are exact zeros, in memory that held NaN."""
    inputs = make(4, 1, 65, 40, 24, torch.float32)
    inputs[3] = torch.full_like(inputs[3], hot)
    got = compare(inputs, torch.float32)
    others = [e for e in range(4) if e != hot]
    assert all(gradient[others].eq(0).all() for gradient in got[2:4])


@pytest.mark.parametrize("share", [0.5, 0.97, 1.0])
def test_remote_choices(share: float) -> None:
    """Choices of −1 with gates of NaN: no row, gradient 0; zeros for a token with only choices of −1."""
    inputs = make(7, 3, 64, 40, 24, torch.float32)
    remote_TK = (torch.rand(64, 3, generator=torch.Generator().manual_seed(1)) < share).to(DEVICE)
    remote_TK[:2] = True
    inputs[3] = inputs[3].masked_fill(remote_TK, -1)
    inputs[4] = inputs[4].detach().masked_fill(remote_TK, torch.nan).requires_grad_()
    got = compare(inputs, torch.float32)
    assert got[4][remote_TK].eq(0).all()
    assert got[0][remote_TK.all(dim=1)].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_pre_activations_have_the_same_bits(dtype: torch.dtype) -> None:
    inputs = make(4, 2, 65, 40, 24, dtype)
    dy_TD = torch.ones((), device=DEVICE, dtype=dtype).expand(65, 40)  # stride zero, as sum() gives
    saved, recomputed = (run(expert_mlp.triton, inputs, dy_TD, keep_pre=keep) for keep in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(saved, recomputed))
    outputs = torch.ops.trinity.expert_mlp_triton(*[x.detach() for x in inputs], 130, False)
    assert outputs[1].numel() == 0


def test_every_number_of_parts_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The epilogue of dH in one, two and four parts: products equal bit for bit, sums over columns to rounding."""
    inputs = make(4, 2, 65, 40, 40, torch.float32)
    for parts in (1, 2, 4):
        monkeypatch.setattr(experts_triton, "dpre_tile", lambda *_, parts=parts: Tile(16, 64, 16, 4, 2, parts))
        compare(inputs, torch.float32)


def test_weight_gradients_are_added_to_main_gradients_in_fp32() -> None:
    """A bf16 weight with an fp32 gradient (grad_dtype): the op creates the gradient, then adds to it.

    Two passes in bf16 arithmetic against float64; their sum is not rounded to bf16: 1e-3 is far below the 2⁻⁹ that
    rounding each to bf16 would leave in single elements, and above the error of A' and dH, which are bf16.
    """
    inputs = make(4, 2, 65, 40, 24, torch.bfloat16)
    for weight in inputs[1:3]:
        weight.grad_dtype = torch.float32
    exact = [torch.zeros_like(weight, dtype=torch.float64) for weight in inputs[1:3]]
    for seed in range(2):
        dy_TD = torch.randn(65, 40, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.bfloat16)
        before = [weight.grad for weight in inputs[1:3]]
        expert_mlp.triton(*inputs).backward(dy_TD)
        assert all(weight.grad.dtype == torch.float32 for weight in inputs[1:3])
        if seed:
            assert all(weight.grad is old for weight, old in zip(inputs[1:3], before))
        for total, gradient in zip(exact, run(expert_mlp.reference, to_float64(inputs), dy_TD)[2:4]):
            total += gradient
    for weight, total in zip(inputs[1:3], exact):
        assert_close(weight.grad, total, BOUNDS[torch.bfloat16])
        assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


def test_main_gradients_under_recompute() -> None:
    """A checkpoint returns a copy of the weight in backward; the op adds to the gradient of the weight all the same.

    The same bits: two passes in bf16 with fp32 gradients, added up by the op.
    """
    results = []
    for through in (lambda f, *a: f(*a), partial(checkpoint, use_reentrant=False)):
        inputs = make(4, 2, 65, 40, 24, torch.bfloat16)
        for weight in inputs[1:3]:
            weight.grad_dtype = torch.float32
        for index in range(2):
            if index:
                before = [weight.grad for weight in inputs[1:3]]
            through(lambda *a: expert_mlp.triton(*a).relu(), *inputs).sum().backward()
        assert all(weight.grad is old for weight, old in zip(inputs[1:3], before))
        results.append([x.grad for x in inputs if x.requires_grad])
    for a, b in zip(*results):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["all local", "some local", "none local"])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_plus(dtype: torch.dtype, kind: str) -> None:
    """plus + Σ against float64, plus not contiguous; in fp32 the same bits as a separate addition.

    Its gradient is the output's, and the other gradients keep their bits.
    """
    inputs = make(7, 3, 65, 40, 24, dtype)
    if kind != "all local":
        inputs[3] = inputs[3].masked_fill(inputs[3] > (2 if kind == "some local" else -1), -1)
    random, rows = torch.Generator().manual_seed(0), (inputs[3] >= 0).sum().item()
    plus_TD, dy_TD = (torch.randn(40, 65, generator=random).to(DEVICE, dtype).t() for _ in range(2))
    inputs.append(plus_TD.requires_grad_())
    fused = run(lambda *a: expert_mlp.triton(*a[:-1], rows=rows, plus_TD=a[-1]), inputs, dy_TD)
    apart = run(lambda *a: a[-1] + expert_mlp.triton(*a[:-1], rows=rows), inputs, dy_TD)
    exact = run(lambda *a: expert_mlp.reference(*a[:-1], rows=rows, plus_TD=a[-1]), to_float64(inputs), dy_TD)
    assert_close(fused[0], exact[0], BOUNDS[dtype])
    assert torch.equal(fused[-1], dy_TD)
    assert all(torch.equal(a, b) for a, b in zip(fused[1:], apart[1:]))
    if dtype == torch.float32:
        assert torch.equal(fused[0], apart[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repetition_gives_the_same_bits(dtype: torch.dtype) -> None:
    inputs = make(7, 2, 64, 40, 24, dtype)
    dy_TD = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    first, second = (run(expert_mlp.triton, inputs, dy_TD) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize(("T", "keep"), [(7, True), (7, False), (0, True)])
def test_opcheck(T: int, keep: bool) -> None:
    """Schema, fake tensors, autograd registration and tracing, by torch's own checker."""
    inputs = make(4, 2, T, 16, 8, torch.float32)
    plus = torch.ones_like(inputs[0])
    torch.library.opcheck(torch.ops.trinity.expert_mlp_triton.default, (*inputs, 2 * T, keep))
    torch.library.opcheck(torch.ops.trinity.expert_mlp_triton.default, (*inputs, 2 * T, keep, plus))
    x, w1, w2, indices, s = (tensor.detach() for tensor in inputs)
    kept = torch.ops.trinity.expert_mlp_triton(x, w1, w2, indices, s, 2 * T, keep)[1:]
    arguments = (torch.ones_like(x), x, w1, w2, s, *kept)
    torch.library.opcheck(torch.ops.trinity.expert_mlp_triton_backward.default, (*arguments, True))
    main = torch.zeros_like(w1), torch.zeros_like(w2)
    torch.library.opcheck(torch.ops.trinity.expert_mlp_triton_backward_into.default, (*arguments, *main))
