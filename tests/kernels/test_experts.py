"""expert_mlp against a loop over tokens and experts in float64.

Shapes: T tokens, D width, E experts, F expert width, K active experts.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from trinity_kernels import expert_mlp
from trinity_kernels.experts import sum_of_rows

D, F = 6, 5
# fp32: rounding 2⁻²⁴ in sums of a few hundred terms; bf16: rounding 2⁻⁹ in half a dozen places
BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}

SIZES = [(E, K, T) for E in (1, 4, 7) for K in sorted({1, 2, E}) if K <= E for T in (0, 1, 7, 64)]


def make(E: int, K: int, T: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, gate_up, down, indices (distinct within a token) and gates; all but the indices require gradients."""
    random = torch.Generator().manual_seed(1000 * E + 100 * K + T)
    x_TD = torch.randn(T, D, generator=random, dtype=torch.float64)
    gate_up_E2FD = torch.randn(E, 2, F, D, generator=random, dtype=torch.float64)
    down_EDF = torch.randn(E, D, F, generator=random, dtype=torch.float64)
    indices_TK = torch.rand(T, E, generator=random).argsort(dim=1)[:, :K]
    s_TK = torch.rand(T, K, generator=random, dtype=torch.float64)
    gates_in = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [x_TD.to(dtype), gate_up_E2FD.to(dtype), down_EDF.to(dtype), indices_TK, s_TK.to(gates_in)]
    return [x.requires_grad_() if x.is_floating_point() else x for x in inputs]


def plain(x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, indices_TK: Tensor, s_TK: Tensor) -> Tensor:
    """Σ_k s·W2·(silu(gate)∘up) in the inputs' dtype, without any batching; −1 is skipped."""
    rows = []
    for t, experts in enumerate(indices_TK.tolist()):
        y_D = 0 * x_TD[t]
        for k, e in enumerate(experts):
            if e == -1:
                continue
            gate, up = gate_up_E2FD[e, 0] @ x_TD[t], gate_up_E2FD[e, 1] @ x_TD[t]
            y_D = y_D + s_TK[t, k].to(y_D.dtype) * (down_EDF[e] @ (gate * torch.sigmoid(gate) * up))
        rows.append(y_D)
    return torch.stack(rows) if rows else x_TD * 1.0


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread computes one expert after the other, several all at once; except in float64."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def local_expert_mlp(*inputs: Tensor) -> Tensor:
    """expert_mlp with the number of choices that are not −1."""
    return expert_mlp(*inputs, rows=(inputs[3] >= 0).sum().item())


def run(function, inputs: list[Tensor], dy_TD: Tensor) -> list[Tensor]:
    """The output and the gradients of x, gate_up, down and gates; zeros for a gradient of None."""
    leaves = [x for x in inputs if x.requires_grad]
    y_TD = function(*inputs)
    grads = torch.autograd.grad(y_TD, leaves, dy_TD.to(y_TD.dtype), allow_unused=True)
    return [y_TD.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves))]


def errors(got: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Relative L2 distance of each tensor; that of an exact zero must be zero."""
    assert [x.shape for x in got] == [x.shape for x in exact]
    return [((a.double() - b).norm() / b.norm().clamp_min(1e-300)).item() for a, b in zip(got, exact)]


def to_float64(inputs: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs]


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize(("E", "K", "T"), SIZES)
def test_matches_loops(E: int, K: int, T: int, dtype: torch.dtype, threads: None) -> None:
    """Output and every gradient, float64 on the same rounded inputs."""
    inputs = make(E, K, T, dtype)
    dy_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(T)).to(dtype)
    got, exact = run(expert_mlp, inputs, dy_TD), run(plain, to_float64(inputs), dy_TD)
    assert [x.dtype for x in got] == [dtype, dtype, dtype, dtype, inputs[-1].dtype]
    assert all(error <= BOUNDS[dtype] for error in errors(got, exact)), errors(got, exact)


def test_bf16_is_no_worse_than_plain_bf16() -> None:
    """At most twice the error of a naive loop in bf16; it is less, because the op sums over K in fp32."""
    inputs = make(7, 2, 64, torch.bfloat16)
    dy_TD = torch.randn(64, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = run(plain, to_float64(inputs), dy_TD)
    fused, naive = errors(run(expert_mlp, inputs, dy_TD), exact), errors(run(plain, inputs, dy_TD), exact)
    assert all(error <= 2 * peer for error, peer in zip(fused, naive)), (fused, naive)


def test_gradcheck() -> None:
    """Finite differences in float64, torch's own tolerances."""
    x, gate_up, down, indices, s = make(3, 2, 5)
    torch.autograd.gradcheck(lambda *a: expert_mlp(*a[:3], indices, a[3]), (x, gate_up, down, s))


@pytest.mark.parametrize("hot", [0, 2, 3])
def test_all_tokens_on_one_expert(hot: int) -> None:
    """The other three experts have no rows: their gradients are exact zeros, not leftovers."""
    inputs = make(4, 1, 7)
    inputs[3] = torch.full((7, 1), hot)
    dy_TD = torch.randn(7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(hot))
    got, exact = run(expert_mlp, inputs, dy_TD), run(plain, inputs, dy_TD)
    assert max(errors(got, exact)) <= BOUNDS[torch.float64]
    for gradient in got[2:4]:
        others = [e for e in range(4) if e != hot]
        assert torch.equal(gradient[others], torch.zeros_like(gradient[others]))
        assert gradient[hot].ne(0).all()


def test_no_tokens_still_give_every_gradient() -> None:
    """A rank without tokens takes part in the gradient reduction: its gradients are zeros, not None."""
    inputs = make(4, 2, 0)
    grads = torch.autograd.grad(expert_mlp(*inputs).sum(), [x for x in inputs if x.requires_grad])
    assert [g.shape for g in grads] == [x.shape for x in inputs if x.requires_grad]
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_strides_do_not_matter() -> None:
    """A transposed x and, from sum(), a gradient of stride zero."""
    inputs = make(4, 2, 7)
    inputs[0] = inputs[0].detach().t().contiguous().t().requires_grad_()
    expanded = torch.ones((), dtype=torch.float64).expand(7, D)
    assert max(errors(run(expert_mlp, inputs, expanded), run(plain, inputs, expanded))) <= BOUNDS[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repetition_gives_the_same_bits(dtype: torch.dtype) -> None:
    inputs = make(7, 2, 64, dtype)
    dy_TD = torch.randn(64, D, generator=torch.Generator().manual_seed(0))
    first, second = run(expert_mlp, inputs, dy_TD), run(expert_mlp, inputs, dy_TD)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def with_remote_choices(inputs: list[Tensor], kind: str) -> list[Tensor]:
    """Set some or all choices to −1 and their gates to NaN, which must not be read."""
    indices_TK, s_TK = inputs[3], inputs[4].detach().clone()
    if kind == "none local":
        remote_TK = torch.ones_like(indices_TK, dtype=torch.bool)
    elif kind == "one local":
        remote_TK = torch.ones_like(indices_TK, dtype=torch.bool)
        remote_TK[3:4, 1] = False
    else:
        remote_TK = torch.rand(indices_TK.shape, generator=torch.Generator().manual_seed(5)) < 0.6
        remote_TK[:2] = True
    s_TK[remote_TK] = torch.nan
    return [*inputs[:3], indices_TK.masked_fill(remote_TK, -1), s_TK.requires_grad_()]


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("kind", ["some local", "one local", "none local"])
@pytest.mark.parametrize("T", [0, 7, 64])
def test_remote_choices(T: int, kind: str, dtype: torch.dtype) -> None:
    """A choice of −1 takes no row and its gate gets no gradient; a token with only choices of −1 gives zeros."""
    inputs = with_remote_choices(make(7, 3, T, dtype), kind)
    dy_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(T)).to(dtype)
    got, exact = run(local_expert_mlp, inputs, dy_TD), run(plain, to_float64(inputs), dy_TD)
    assert [x.dtype for x in got] == [dtype, dtype, dtype, dtype, inputs[-1].dtype]
    assert all(error <= BOUNDS[dtype] for error in errors(got, exact)), errors(got, exact)
    remote_TK = inputs[3] < 0
    assert got[4][remote_TK].eq(0).all()
    assert got[0][remote_TK.all(dim=1)].eq(0).all()
    again = run(local_expert_mlp, inputs, dy_TD)
    assert all(torch.equal(a, b) for a, b in zip(got, again))


def test_remote_choices_take_no_memory() -> None:
    """Pre-activations are saved only for rows that are computed."""
    x, gate_up, down, indices, s = with_remote_choices(make(7, 3, 64), "some local")
    rows = (indices >= 0).sum().item()
    assert 0 < rows < indices.numel() / 2
    _, pre_RH = torch.ops.trinity.expert_mlp(x, gate_up.flatten(1, 2), down, indices, s, rows)
    assert pre_RH.shape == (rows, 2 * F)
    assert pre_RH.untyped_storage().nbytes() == pre_RH.numel() * pre_RH.element_size()


def test_gradcheck_with_remote_choices() -> None:
    x, gate_up, down, indices, s = make(3, 2, 5)
    indices = indices.masked_fill(torch.tensor([[1, 0], [0, 0], [1, 1], [0, 1], [0, 0]], dtype=torch.bool), -1)
    torch.autograd.gradcheck(lambda *a: local_expert_mlp(*a[:3], indices, a[3]), (x, gate_up, down, s))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sum_of_rows(dtype: torch.dtype) -> None:
    """Tokens of 2, 0, 1 and 3 rows, weighted or not, against a loop; sums in fp32 of a few terms are exact to 1e-6."""
    random = torch.Generator().manual_seed(0)
    rows_RD, counts = torch.randn(6, D, generator=random, dtype=torch.float64).to(dtype), [2, 0, 1, 3]
    weights_R = torch.rand(6, generator=random, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    order = [5, 0, 3, 1, 4, 2]
    for weights in (None, weights_R):
        got = sum_of_rows(rows_RD, torch.tensor(order), torch.tensor(counts), weights)
        assert got.dtype == weights_R.dtype
        places = iter(order)
        for t, count in enumerate(counts):
            rows = [next(places) for _ in range(count)]
            expected = sum((1 if weights is None else weights[r].double()) * rows_RD[r].double() for r in rows)
            torch.testing.assert_close(got[t].double(), expected + torch.zeros(D).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("kind", ["all local", "some local", "none local"])
@pytest.mark.parametrize("T", [0, 7, 64])
def test_plus(T: int, kind: str, dtype: torch.dtype, threads: None) -> None:
    """plus + Σ: the equation, its gradient is the output's, and the other gradients keep their bits.

    In float64 the same bits as a separate addition. In bf16 one rounding less: no further from float64, over enough
    numbers.
    """
    inputs = make(7, 3, T, dtype)
    if kind != "all local":
        inputs = with_remote_choices(inputs, kind)
    random = torch.Generator().manual_seed(T)
    plus_TD, dy_TD = (torch.randn(T, D, generator=random, dtype=torch.float64).to(dtype) for _ in range(2))
    plus_TD.requires_grad_()
    rows = (inputs[3] >= 0).sum().item()
    fused = run(lambda *a: expert_mlp(*a[:-1], rows=rows, plus_TD=a[-1]), [*inputs, plus_TD], dy_TD)
    apart = run(lambda *a: a[-1] + expert_mlp(*a[:-1], rows=rows), [*inputs, plus_TD], dy_TD)
    exact = run(lambda *a: a[-1] + plain(*a[:-1]), to_float64([*inputs, plus_TD]), dy_TD)
    assert all(torch.equal(a, b) for a, b in zip(fused[1:], apart[1:]))
    assert torch.equal(fused[-1], dy_TD)
    assert errors(fused, exact)[0] <= BOUNDS[dtype]
    if dtype == torch.bfloat16:
        assert T < 64 or errors(fused, exact)[0] <= errors(apart, exact)[0]
    elif dtype == torch.float64:
        assert torch.equal(fused[0], apart[0])


def test_gradcheck_of_plus() -> None:
    x, gate_up, down, indices, s = make(3, 2, 5)
    plus = torch.randn(5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.autograd.gradcheck(lambda *a: expert_mlp(*a[:3], indices, a[3], plus_TD=a[4]), (x, gate_up, down, s, plus))


@pytest.mark.parametrize("rows", [14, 5, 0])
@pytest.mark.parametrize("T", [0, 7])
def test_opcheck(T: int, rows: int) -> None:
    """Schema, fake tensors, autograd registration and tracing of both custom ops, by torch's own checker."""
    x, gate_up, down, indices, s = make(4, 2, T)
    rows = min(rows, 2 * T)
    indices = indices.flatten().index_fill(0, torch.arange(2 * T)[rows:], -1).view_as(indices)
    w1_EHD = gate_up.detach().flatten(1, 2).requires_grad_()
    for plus in ((), (torch.ones_like(x),)):
        torch.library.opcheck(torch.ops.trinity.expert_mlp.default, (x, w1_EHD, down, indices, s, rows, *plus))
    plain_inputs = [tensor.detach() for tensor in (x, w1_EHD, down, indices, s)]
    _, pre_RH = torch.ops.trinity.expert_mlp(*plain_inputs, rows)
    torch.library.opcheck(torch.ops.trinity.expert_mlp_backward.default, (torch.ones_like(x), *plain_inputs, pre_RH))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("function", [expert_mlp, local_expert_mlp])
def test_on_a_gpu(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """torch's grouped GEMM in bf16 needs rows of a multiple of 16 bytes: 64 and 32 wide here, one expert empty.

    With `local_expert_mlp`, half of the choices are −1.
    """
    random = torch.Generator().manual_seed(0)
    shapes = [(100, 64), (8, 2, 32, 64), (8, 64, 32)]
    inputs = [torch.randn(shape, generator=random, dtype=torch.float64).to("cuda", dtype) / 8 for shape in shapes]
    indices_TK = torch.rand(100, 7, generator=random).argsort(dim=1)[:, :2].cuda()
    if function is local_expert_mlp:
        indices_TK = indices_TK.where(torch.rand(100, 2, generator=random).cuda() < 0.5, -1)
    s_TK = torch.rand(100, 2, generator=random).to("cuda", torch.float64 if dtype == torch.float64 else torch.float32)
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in (*inputs, indices_TK, s_TK)]
    dy_TD = torch.randn(100, 64, generator=random).to("cuda", dtype)
    got, exact = run(function, inputs, dy_TD), run(plain, to_float64(inputs), dy_TD)
    assert all(error <= BOUNDS[dtype] for error in errors(got, exact)), errors(got, exact)
