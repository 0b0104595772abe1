"""linear_cross_entropy in Triton against whole float64 logits, F.cross_entropy and z·lse².

Shapes: T tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.triton_case import BOUNDS, DEVICE, assert_close
from trinity_kernels import cross_entropy, cross_entropy_triton, linear_cross_entropy
from trinity_kernels.cross_entropy import IGNORE
from trinity_kernels.cross_entropy_triton import Tile, logits_to_gradient

D, V = 16, 200
Z = 0.01  # large enough that a wrong z-term shows at every bound


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """small_tiles(logits per step, tokens per chunk); by default steps of 64 of the 200 logits, and one chunk."""

    def set_(block: int, tokens: int) -> None:
        monkeypatch.setattr(cross_entropy_triton, "tile", lambda vocabulary, itemsize: Tile(block, 4))
        monkeypatch.setattr(cross_entropy, "chunk_tokens", lambda *_: tokens)

    set_(64, 1000)
    return set_


def make(T: int, dtype: torch.dtype = torch.float32, vocabulary: int = V) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and targets, a quarter of them ignored; logits of standard deviation 4."""
    random = torch.Generator().manual_seed(T)
    x_TD = torch.randn(T, D, generator=random).to(DEVICE, dtype)
    weight_VD = torch.randn(vocabulary, D, generator=random).to(DEVICE, dtype)
    targets_T = torch.randint(vocabulary, (T,), generator=random)
    targets_T[torch.rand(T, generator=random) < 0.25] = IGNORE
    return x_TD.requires_grad_(), weight_VD.requires_grad_(), targets_T.to(DEVICE)


def plain(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z: float, weights_T: Tensor | float = 1.0
) -> list[Tensor]:  # fmt: skip
    """Total, CE, lse, largest logit, dX and dW from all logits at once, in float64 on the same rounded inputs."""
    x_TD, weight_VD = (t.detach().double().requires_grad_() for t in (x_TD, weight_VD))
    logits_TV = x_TD @ weight_VD.t()
    ce_T = F.cross_entropy(logits_TV, targets_T, reduction="none", ignore_index=IGNORE)
    lse_T = torch.where(targets_T == IGNORE, 0.0, logits_TV.logsumexp(dim=1))
    total = (weights_T * (ce_T + z * lse_T**2)).sum()
    return [total, ce_T, lse_T, logits_TV.amax(dim=1), *torch.autograd.grad(total, (x_TD, weight_VD))]


def triton_results(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z: float) -> list[Tensor]:
    """The same six results of the Triton op."""
    results = linear_cross_entropy(x_TD, weight_VD, targets_T, z, kernel="triton")
    assert [y.dtype for y in results] == [torch.float32] * 4
    assert [y.requires_grad for y in results] == [True, False, False, False]
    return [*results, *torch.autograd.grad(results[0], (x_TD, weight_VD))]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("z", [0.0, Z])
def test_matches_whole_logits(z: float, dtype: torch.dtype) -> None:
    inputs = make(37, dtype)
    got, exact = triton_results(*inputs, z), plain(*inputs, z)
    assert [g.dtype for g in got[4:]] == [dtype, dtype]
    for a, b in zip(got, exact):
        assert_close(a, b, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_weights(small_tiles: Callable, dtype: torch.dtype) -> None:
    """Σ w·(CE + z·lse²) and its gradients in chunks of 10 tokens; the values per token are not weighted."""
    small_tiles(64, 10)
    x_TD, weight_VD, targets_T = make(37, dtype)
    weights_T = (torch.rand(37, generator=torch.Generator().manual_seed(1)) * 2).to(DEVICE)
    weights_T[5] = 0.0
    results = linear_cross_entropy(x_TD, weight_VD, targets_T, Z, weights_T=weights_T, kernel="triton")
    got = [*results, *torch.autograd.grad(results[0], (x_TD, weight_VD))]
    exact = plain(x_TD, weight_VD, targets_T, Z, weights_T)
    for a, b in zip(got, exact):
        assert_close(a, b, BOUNDS[dtype])
    unweighted = triton_results(x_TD, weight_VD, targets_T, Z)
    assert same(got[1:4], unweighted[1:4])
    ones = linear_cross_entropy(x_TD, weight_VD, targets_T, Z, weights_T=torch.ones_like(weights_T), kernel="triton")
    assert same([*ones, *torch.autograd.grad(ones[0], (x_TD, weight_VD))], unweighted)


@pytest.mark.parametrize("T", [0, 1, 7, 63, 64, 65, 129])
def test_any_number_of_tokens(T: int) -> None:
    """With one step per row, because the interpreter is slow."""
    inputs = make(T, vocabulary=50)
    for a, b in zip(triton_results(*inputs, Z), plain(*inputs, Z)):
        assert_close(a, b, BOUNDS[torch.float32])


@pytest.mark.parametrize("vocabulary", [1, 2, 63, 64, 65, 128])
def test_any_vocabulary(vocabulary: int) -> None:
    inputs = make(7, vocabulary=vocabulary)
    for a, b in zip(triton_results(*inputs, Z), plain(*inputs, Z)):
        assert_close(a, b, BOUNDS[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("block", "tokens"), [(64, 1), (64, 10), (512, 1000)])
def test_chunks_and_tiles_do_not_matter(small_tiles: Callable, block: int, tokens: int, dtype: torch.dtype) -> None:
    """Up to rounding: other tiles group the sums within a row differently, other chunks those of dW."""
    inputs = make(37, dtype)
    one = triton_results(*inputs, Z)
    small_tiles(block, tokens)
    other = triton_results(*inputs, Z)
    for a, b in zip(other, one):
        assert_close(a, b, BOUNDS[dtype])
    if tokens == 10 and DEVICE == "cpu":  # logits of one row, or on a GPU, may come from another algorithm
        assert same(other[:4], one[:4])


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_the_tiles_of_the_table(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """One token with each real tile: 2, 3, 5 and 9 steps in fp32, 1, 2, 3 and 5 in 16 bits.

    Logits of about 1, because with one token the errors of rounded logits do not average out.
    """
    monkeypatch.undo()
    for vocabulary in (4000, 8208, 66000, 66001):
        x_TD, weight_VD, targets_T = make(1, dtype, vocabulary)
        inputs = (x_TD.detach() / 4).requires_grad_(), weight_VD, torch.full_like(targets_T, vocabulary - 1)
        for a, b in zip(triton_results(*inputs, Z), plain(*inputs, Z)):
            assert_close(a, b, BOUNDS[dtype])


def loss_of(logits_CV: Tensor, targets_C: Tensor, z: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CE, lse, largest logit, and the logits after the kernel."""
    per_token = [torch.full((len(logits_CV),), torch.nan, device=DEVICE) for _ in range(3)]
    return *per_token, logits_to_gradient(logits_CV.clone(), targets_C, z, *per_token, True)


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_large_logits(dtype: torch.dtype) -> None:
    """±1e4, whose exponential overflows fp32: one largest, two equal largest, target not the largest, all equal.

    fp32 rounds 1e4 to 5e-4, and log 2 alone to 1e-7: CE keeps its digits, lse cannot.
    """
    logits_CV = torch.full((4, V), -1e4, device=DEVICE)
    logits_CV[:2, 150], logits_CV[1, 3], logits_CV[2, 0] = 1e4, 1e4, 1e4
    logits_CV = logits_CV.to(dtype)
    high = logits_CV[0, 150].item()
    ce_C, lse_C, top_C, gradient_CV = loss_of(logits_CV, torch.tensor([150, 3, 199, 5], device=DEVICE))
    exact = torch.tensor([0.0, 2.0, 0.0, V], dtype=torch.float64).log().clamp_min(0)
    exact[2] = 2 * high
    assert torch.allclose(ce_C.double().cpu(), exact, rtol=1e-6, atol=0)
    assert torch.allclose(
        lse_C.double().cpu(), torch.tensor([high, high, high, -high]) + exact * (exact < 10), rtol=1e-7
    )
    assert top_C.tolist() == [high, high, high, -high]
    expected_CV = torch.zeros(4, V, device=DEVICE)
    expected_CV[1, 150], expected_CV[1, 3], expected_CV[2, 0], expected_CV[2, 199] = 0.5, -0.5, 1, -1
    expected_CV[3] = 1 / V
    expected_CV[3, 5] -= 1
    assert_close(gradient_CV, expected_CV, BOUNDS[dtype] / 10)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # ∞ − ∞
@pytest.mark.parametrize("filling", [torch.inf, -torch.inf, torch.nan])
def test_the_content_of_an_ignored_row_has_no_effect(filling: float) -> None:
    """Its results are zeros and no bit of the others changes; the largest logit is returned as it is."""
    logits_CV = torch.randn(3, V, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets_C = torch.tensor([5, IGNORE, 199], device=DEVICE)
    clean = loss_of(logits_CV, targets_C, Z)
    logits_CV[1, 77] = filling
    spoilt = loss_of(logits_CV, targets_C, Z)
    for a, b in zip(spoilt, clean):
        assert torch.equal(a[::2], b[::2])
    for zero in (spoilt[0][1], spoilt[1][1], spoilt[3][1]):
        assert torch.equal(zero, torch.zeros_like(zero))
    assert spoilt[2][1].item() == pytest.approx(logits_CV[1].amax().item(), nan_ok=True)


@pytest.mark.parametrize("target", [-1, V, 2**40])
def test_a_target_out_of_range_gives_nan(target: int) -> None:
    """And no memory outside the row is read."""
    ce_C, *_ = loss_of(torch.zeros(2, V, device=DEVICE), torch.tensor([0, target], device=DEVICE))
    assert ce_C.isnan().tolist() == [False, True]


def test_a_nan_logit_gives_nan() -> None:
    logits_CV = torch.zeros(3, V, device=DEVICE)
    logits_CV[1, 100] = torch.nan
    ce_C, lse_C, top_C, gradient_CV = loss_of(logits_CV, torch.zeros(3, dtype=torch.int64, device=DEVICE))
    for tensor in (ce_C, lse_C, top_C, gradient_CV.sum(dim=1)):
        assert tensor.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_all_targets_ignored(dtype: torch.dtype) -> None:
    x_TD, weight_VD, targets_T = make(5, dtype)
    total, ce_T, lse_T, top_T, grad_x, grad_weight = triton_results(
        x_TD, weight_VD, torch.full_like(targets_T, IGNORE), Z
    )
    for zero in (total.detach(), ce_T, lse_T, grad_x, grad_weight):
        assert torch.equal(zero, torch.zeros_like(zero))
    assert_close(top_T, plain(x_TD, weight_VD, targets_T, Z)[3], BOUNDS[dtype])


def test_repetition_gives_the_same_bits() -> None:
    inputs = make(37, torch.bfloat16)
    assert same(triton_results(*inputs, Z), triton_results(*inputs, Z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_the_reference(dtype: torch.dtype) -> None:
    """The reference computes the same equation with torch; in bf16 both round logits and their gradient alike."""
    inputs = make(37, dtype)
    results = linear_cross_entropy(*inputs, Z, kernel="reference")
    reference = [*results, *torch.autograd.grad(results[0], inputs[:2])]
    for a, b in zip(triton_results(*inputs, Z), reference):
        assert_close(a, b, BOUNDS[dtype])


@pytest.mark.parametrize("trains", [(True, False), (False, True), (False, False)])
def test_frozen_inputs(trains: tuple[bool, bool]) -> None:
    """An input that needs no gradient gets none, and nothing else changes."""
    x_TD, weight_VD, targets_T = make(7)
    exact = triton_results(x_TD, weight_VD, targets_T, Z)
    inputs = [x.detach().requires_grad_(needs) for x, needs in zip((x_TD, weight_VD), trains)]
    got = linear_cross_entropy(*inputs, targets_T, Z, kernel="triton")
    assert same(list(got), exact[:4])
    assert [y.requires_grad for y in got] == [any(trains), False, False, False]
    if any(trains):
        got[0].backward()
    for tensor, needs, gradient in zip(inputs, trains, exact[4:]):
        assert torch.equal(tensor.grad, gradient) if needs else tensor.grad is None


def test_evaluation_forms_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under no_grad the kernel leaves the logits unchanged and no gradient product runs, though the weight trains."""
    x_TD, weight_VD, targets_T = make(7)
    exact = triton_results(x_TD, weight_VD, targets_T, Z)
    unchanged = []

    def spy(logits_CV: Tensor, *rest: object) -> Tensor:
        before = logits_CV.clone()
        after = logits_to_gradient(logits_CV, *rest)
        unchanged.append(torch.equal(after, before))
        return after

    monkeypatch.setattr(cross_entropy_triton, "logits_to_gradient", spy)
    monkeypatch.setattr(cross_entropy, "add_product_", None)
    with torch.no_grad():
        got = linear_cross_entropy(x_TD, weight_VD, targets_T, Z, kernel="triton")
    assert same(list(got), exact[:4])
    assert unchanged == [True]


def test_incoming_gradient_is_not_rounded() -> None:
    """1/3 in bf16 is 0.3340: dX and dW would all be 0.2 % too large. Here only their own rounding is left."""
    x_TD, weight_VD, targets_T = make(37, torch.bfloat16)
    total = linear_cross_entropy(x_TD, weight_VD, targets_T, Z, kernel="triton")[0]
    whole = torch.autograd.grad(total, (x_TD, weight_VD), retain_graph=True)
    third = torch.autograd.grad(total / 3, (x_TD, weight_VD))
    for a, b in zip(third, whole):
        assert abs((3 * a.double()).abs().sum() / b.double().abs().sum() - 1) < 2e-4


def test_opcheck() -> None:
    x_TD, weight_VD, targets_T = make(5, vocabulary=50)
    for flags in ((True, True), (True, False), (False, False)):
        inputs = [x.detach().requires_grad_(flag) for x, flag in zip((x_TD, weight_VD), flags)]
        for weights_T in (None, torch.rand(5, device=DEVICE)):
            arguments = (*inputs, targets_T, Z, *flags, torch.float32, weights_T)
            torch.library.opcheck(torch.ops.trinity.linear_cross_entropy.default, arguments)


def test_float64_is_refused() -> None:
    x_TD, weight_VD, targets_T = make(1)
    with pytest.raises(ValueError, match=r"its sums are in fp32 and x is torch\.float64; use auto or reference"):
        linear_cross_entropy(x_TD.double(), weight_VD.double(), targets_T, kernel="triton")
