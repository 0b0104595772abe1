"""linear_cross_entropy against whole float64 logits, F.cross_entropy and z·lse².

Shapes: T tokens, D width, V vocabulary.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trinity_kernels import cross_entropy, linear_cross_entropy
from trinity_kernels.cross_entropy import IGNORE

T, D, V = 37, 8, 50
Z = 0.01  # large enough that a wrong z-term shows at every bound below
# fp32: rounding 2⁻²⁴ in sums of a few dozen terms; bf16: rounding 2⁻⁹ of logits' gradient and of the results
BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def make(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and targets; a quarter of the targets are ignored."""
    random = torch.Generator().manual_seed(0)
    x_TD = torch.randn(T, D, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VD = torch.randn(V, D, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    targets_T = torch.randint(V, (T,), generator=random)
    targets_T[torch.rand(T, generator=random) < 0.25] = IGNORE
    return x_TD, weight_VD, targets_T


def plain(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same four results from all logits at once, in float64."""
    logits_TV = x_TD.double() @ weight_VD.double().t()
    ce_T = F.cross_entropy(logits_TV, targets_T, reduction="none", ignore_index=-100)
    lse_T = torch.where(targets_T == -100, 0.0, logits_TV.exp().sum(dim=1).log())
    return (ce_T + z * lse_T**2).sum(), ce_T, lse_T, logits_TV.amax(dim=1)


def error(got: Tensor, exact: Tensor) -> float:
    """Relative L2 distance."""
    assert got.shape == exact.shape
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.fixture(params=[1, 10, 1000], ids=["a token a chunk", "10 tokens a chunk", "one chunk"])
def set_chunk_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of this many fp32 tokens (half as many in float64); 37 tokens leave a rest in the last one."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * V * request.param)
    return request.param


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("z", [0.0, Z])
@pytest.mark.usefixtures("set_chunk_tokens")
def test_matches_whole_logits(z: float, dtype: torch.dtype) -> None:
    """All four results, and gradients under an incoming factor of 3; float64 on the same rounded inputs."""
    x_TD, weight_VD, targets_T = make(dtype)
    got, exact = linear_cross_entropy(x_TD, weight_VD, targets_T, z), plain(x_TD, weight_VD, targets_T, z)
    high = torch.float64 if dtype == torch.float64 else torch.float32
    assert [y.dtype for y in got] == [high] * 4
    grads = torch.autograd.grad(3 * got[0], (x_TD, weight_VD))
    exact_grads = torch.autograd.grad(3 * exact[0], (x_TD, weight_VD))
    assert [g.dtype for g in grads] == [dtype, dtype]
    errors = [error(a, b) for a, b in zip((*got, *grads), (*exact, *exact_grads))]
    assert max(errors) <= BOUNDS[dtype], errors


def test_bf16_is_no_worse_than_torch_in_bf16() -> None:
    """At most twice the error of F.cross_entropy on bf16 logits."""
    x_TD, weight_VD, targets_T = make(torch.bfloat16)
    naive = F.cross_entropy((x_TD @ weight_VD.t()).float(), targets_T, reduction="sum")
    results = linear_cross_entropy(x_TD, weight_VD, targets_T), (naive,), plain(x_TD, weight_VD, targets_T, 0.0)
    fused, torch_results, exact = ((y[0], *torch.autograd.grad(y[0], (x_TD, weight_VD))) for y in results)
    for actual, peer, true in zip(fused, torch_results, exact):
        assert error(actual, true) <= 2 * error(peer, true)


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite differences of the total in float64, two tokens a chunk, torch's own tolerances."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 8 * V * 2)
    x_TD, weight_VD, targets_T = make()
    torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, targets_T[:5], Z)[0], (x_TD[:5], weight_VD))


@pytest.mark.parametrize("trains", [(True, False), (False, True), (False, False)])
def test_frozen_inputs(trains: tuple[bool, bool]) -> None:
    """An input that needs no gradient gets none, and nothing else changes."""
    x_TD, weight_VD, targets_T = make()
    exact = linear_cross_entropy(x_TD, weight_VD, targets_T, Z)
    exact_grads = torch.autograd.grad(exact[0], (x_TD, weight_VD))
    inputs = [x.detach().requires_grad_(needs) for x, needs in zip((x_TD, weight_VD), trains)]
    got = linear_cross_entropy(*inputs, targets_T, Z)
    assert all(torch.equal(a, b) for a, b in zip(got, exact))
    assert [y.requires_grad for y in got] == [any(trains), False, False, False]
    if any(trains):
        got[0].backward()
    for tensor, needs, gradient in zip(inputs, trains, exact_grads):
        assert torch.equal(tensor.grad, gradient) if needs else tensor.grad is None


def test_evaluation_forms_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under no_grad, though the weight requires a gradient; the results are the same."""
    x_TD, weight_VD, targets_T = make()
    exact = linear_cross_entropy(x_TD, weight_VD, targets_T, Z)
    for name in ("_logits_gradient", "add_product_"):
        monkeypatch.setattr(cross_entropy, name, None)
    with torch.no_grad():
        got = linear_cross_entropy(x_TD, weight_VD, targets_T, Z)
    assert all(torch.equal(a, b) for a, b in zip(got, exact))


def test_a_leaf_with_grad_dtype_fp32_gets_fp32_gradients() -> None:
    """dW of a bf16 weight with grad_dtype fp32 is not rounded; rounding it gives the gradient without grad_dtype.

    The two differ by up to 2⁻⁹ of a number, so they are not all equal.
    """
    x_TD, weight_VD, targets_T = make(torch.bfloat16)
    precise_VD = weight_VD.detach().clone().requires_grad_()
    precise_VD.grad_dtype = torch.float32
    for weight in (weight_VD, precise_VD):
        (linear_cross_entropy(x_TD, weight, targets_T, Z)[0] / 3).backward()
    assert (weight_VD.grad.dtype, precise_VD.grad.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(precise_VD.grad.bfloat16(), weight_VD.grad)
    assert not torch.equal(precise_VD.grad, weight_VD.grad.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_grad_weight_dtype_where_any_is_allowed(dtype: torch.dtype | None) -> None:
    """A leaf whose grad_dtype is None gets an fp32 gradient, unless grad_weight_dtype is given."""
    x_TD, weight_VD, targets_T = make(torch.bfloat16)
    weight_VD.grad_dtype = None
    linear_cross_entropy(x_TD, weight_VD, targets_T, Z, grad_weight_dtype=dtype)[0].backward()
    assert weight_VD.grad.dtype == (dtype or torch.float32)


def test_incoming_gradient_is_not_rounded() -> None:
    """1/3 in bf16 is 0.3340: dX and dW would all be 0.2 % too large. Here only their own rounding is left."""
    x_TD, weight_VD, targets_T = make(torch.bfloat16)
    total = linear_cross_entropy(x_TD, weight_VD, targets_T, Z)[0]
    whole = torch.autograd.grad(total, (x_TD, weight_VD), retain_graph=True)
    third = torch.autograd.grad(total / 3, (x_TD, weight_VD))
    for a, b in zip(third, whole):
        assert abs((3 * a.double()).abs().sum() / b.double().abs().sum() - 1) < 2e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_does_not_wait_for_the_device(dtype: torch.dtype) -> None:
    """On meta tensors, which cannot return a value to the host, as on any device but a CPU."""
    x_TD, weight_VD, targets_T = (tensor.to("meta") for tensor in make(dtype))
    total, *_ = linear_cross_entropy(x_TD, weight_VD, targets_T, Z)
    grads = torch.autograd.grad(total, (x_TD, weight_VD))
    assert [(g.shape, g.dtype) for g in grads] == [((T, D), dtype), ((V, D), dtype)]


@pytest.mark.parametrize(
    ("tokens", "itemsize", "device", "expected"),
    [
        (32768, 2, "cuda", 8192),  # four equal chunks
        (8192, 2, "cuda", 8192),
        (8193, 2, "cuda", 8193 // 128 * 128 + 128),  # all of them: 8320 tokens fit
        (8321, 2, "cuda", 4224),  # two of about the same size
        (32768, 4, "cuda", 4096),
        (1000, 4, "cpu", 256),  # 335 fit
        (5, 4, "cpu", 128),
        (0, 4, "cpu", 1),
        (1000, 8, "cpu", 128),  # float64
    ],
)
def test_chunks_of_trinitys_vocabulary(tokens: int, itemsize: int, device: str, expected: int) -> None:
    assert cross_entropy.chunk_tokens(tokens, 200_192, itemsize, device) == expected


@pytest.mark.parametrize(("itemsize", "device", "expected"), [(4, "cpu", 512), (8, "cpu", 2048), (4, "cuda", 2048)])
def test_chunks_of_a_small_vocabulary_fit_the_cache(itemsize: int, device: str, expected: int) -> None:
    """On a CPU, except in float64, whose bits stay as they were."""
    assert cross_entropy.chunk_tokens(2048, 8192, itemsize, device) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_of_rows_change_no_bit(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Rows are independent: in blocks of one row as in one block, ignored targets included."""
    random = torch.Generator().manual_seed(0)
    x_TD, weight_VD = (torch.randn(n, 16, generator=random).to(dtype).requires_grad_() for n in (33, 64))
    targets_T = torch.randint(64, (33,), generator=random)
    targets_T[::5] = IGNORE
    found = []
    for limit in (2**20, 1):
        monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", limit)
        results = linear_cross_entropy(x_TD, weight_VD, targets_T, Z)
        found.append([*results, *torch.autograd.grad(results[0], (x_TD, weight_VD))])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_a_chunk_has_a_token_at_least() -> None:
    assert cross_entropy.chunk_tokens(10, 10**9, 4, "cpu") == 1


@pytest.mark.usefixtures("set_chunk_tokens")
def test_all_targets_ignored() -> None:
    """Loss and gradients are exact zeros; the largest logits are still returned."""
    x_TD, weight_VD, _ = make()
    total, ce_T, lse_T, top_T = linear_cross_entropy(x_TD, weight_VD, torch.full((T,), IGNORE), Z)
    total.backward()
    for zero in (total.detach(), ce_T, lse_T, x_TD.grad, weight_VD.grad):
        assert torch.equal(zero, torch.zeros_like(zero))
    assert error(top_T, (x_TD @ weight_VD.t()).amax(dim=1)) <= BOUNDS[torch.float64]


def test_no_tokens() -> None:
    _, weight_VD, _ = make()
    x_TD = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    total, *per_token = linear_cross_entropy(x_TD, weight_VD, torch.zeros(0, dtype=torch.int64), Z)
    total.backward()
    assert total.item() == 0.0
    assert [y.shape for y in per_token] == [(0,)] * 3
    assert torch.equal(weight_VD.grad, torch.zeros_like(weight_VD))


def test_an_ignored_token_may_overflow() -> None:
    """Padding whose logits are infinite in fp32 changes no bit of the other results."""
    x_TD, weight_VD, targets_T = make(torch.float32)
    targets_T[3] = IGNORE
    results = []
    for padding in (1.0, 1e38):
        x = x_TD.detach().clone()
        x[3] = padding
        x.requires_grad_()
        total, ce_T, lse_T, top_T = linear_cross_entropy(x, weight_VD, targets_T, Z)
        results.append([total.detach(), ce_T, lse_T, *torch.autograd.grad(total, (x, weight_VD))])
    assert top_T[3].isinf()
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_large_logits_do_not_overflow() -> None:
    """exp of logits of ±1000 overflows fp32, so the largest must be subtracted first. Rounding of 1000 is 6e-5."""
    x_TD = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight_VD = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    total, ce_T, _, _ = linear_cross_entropy(x_TD, weight_VD, torch.tensor([0, 0]), 0.0)
    assert ce_T.tolist() == pytest.approx([0.0, 2000.0], abs=1e-4)
    grads = torch.autograd.grad(total, (x_TD, weight_VD))
    assert grads[0].flatten().tolist() == pytest.approx([0.0, -2.0])
    assert grads[1].flatten().tolist() == pytest.approx([1000.0, -1000.0, 0.0])


def test_cross_entropy_of_large_logits_keeps_its_digits() -> None:
    """Two equal largest logits at 1e4: CE is log 2. From lse, which fp32 rounds to 5e-4, it would be 0.6934."""
    x_TD, weight_VD = torch.tensor([[1e4]]), torch.tensor([[1.0], [1.0], [-1.0]])
    _, ce_T, *_ = linear_cross_entropy(x_TD, weight_VD, torch.tensor([0]))
    assert ce_T.item() == pytest.approx(0.69314718, rel=1e-7)


def test_repetition_gives_the_same_bits() -> None:
    x_TD, weight_VD, targets_T = make(torch.bfloat16)
    runs = []
    for _ in range(2):
        y = linear_cross_entropy(x_TD, weight_VD, targets_T, Z)
        runs.append([*y, *torch.autograd.grad(y[0], (x_TD, weight_VD))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.usefixtures("set_chunk_tokens")
def test_weights(dtype: torch.dtype) -> None:
    """Total and gradients of Σ w·(CE + z·lse²) from all logits in float64; the values per token are not weighted."""
    x_TD, weight_VD, targets_T = make(dtype)
    weights_T = torch.rand(T, generator=torch.Generator().manual_seed(1)) * 2
    weights_T[5] = 0.0
    got = linear_cross_entropy(x_TD, weight_VD, targets_T, Z, weights_T=weights_T)
    _, *exact = plain(x_TD, weight_VD, targets_T, Z)
    total = (weights_T.double() * (exact[0] + Z * exact[1] ** 2)).sum()
    grads, exact_grads = (torch.autograd.grad(3 * t, (x_TD, weight_VD)) for t in (got[0], total))
    errors = [error(a, b) for a, b in zip((*got, *grads), (total, *exact, *exact_grads))]
    assert max(errors) <= BOUNDS[dtype], errors


def test_weights_of_one_change_no_bit() -> None:
    x_TD, weight_VD, targets_T = make(torch.float32)
    found = []
    for weights_T in (None, torch.ones(T)):
        results = linear_cross_entropy(x_TD, weight_VD, targets_T, Z, weights_T=weights_T)
        found.append([*results, *torch.autograd.grad(results[0], (x_TD, weight_VD))])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_gradcheck_with_weights() -> None:
    x_TD, weight_VD, targets_T = make()
    weights_T = torch.tensor([0.5, 2.0, 0.0, 1.0, 0.25])

    def total(x_TD: Tensor, weight_VD: Tensor) -> Tensor:
        return linear_cross_entropy(x_TD, weight_VD, targets_T[:5], Z, weights_T=weights_T)[0]

    torch.autograd.gradcheck(total, (x_TD[:5], weight_VD))
