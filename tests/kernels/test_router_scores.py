"""router_scores: the reference, and the proof that three bf16 parts make an fp32 product and choose the same experts.

Shapes: T tokens, D width, E experts, K active experts.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.three_parts import KINDS, NEAREST, TRUNCATED, inputs, logit_bound, parts_of, tensor_core_logits
from trinity_kernels import route, router_scores


def make(dtype: torch.dtype, T: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """x, an fp32 weight (float64 with x in float64) and a gradient of the scores."""
    random = torch.Generator().manual_seed(0)
    x_TD, weight_ED, ds_TE = (torch.randn(s, generator=random, dtype=torch.float64) for s in ((T, 48), (6, 48), (T, 6)))
    high = torch.promote_types(dtype, torch.float32)
    return x_TD.to(dtype).requires_grad_(), weight_ED.to(high).requires_grad_(), ds_TE.to(high)


@pytest.mark.parametrize("T", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_has_the_bits_of_the_plain_product(dtype: torch.dtype, T: int) -> None:
    """σ of x·Wᵀ with x cast to fp32, and all gradients, bit for bit; near float64: sums of 48 products, 1e-5."""
    x, weight, ds = make(dtype, T)
    scores = router_scores(x, weight)
    plain = torch.sigmoid(F.linear(x if dtype == torch.float64 else x.float(), weight))
    assert torch.equal(scores, plain)
    for got, expected, source in zip(*(torch.autograd.grad(y, (x, weight), ds) for y in (scores, plain)), (x, weight)):
        assert got.dtype == source.dtype
        assert torch.equal(got, expected)
    exact = torch.sigmoid(x.double() @ weight.double().t())
    torch.testing.assert_close(scores.double(), exact, rtol=0, atol=1e-14 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("trains", [(True, False), (False, True)])
def test_frozen_inputs(trains: tuple[bool, bool]) -> None:
    """An input that needs no gradient gets none; the other gradient is the same."""
    x, weight, ds = make(torch.bfloat16)
    both = torch.autograd.grad(router_scores(x, weight), (x, weight), ds)
    tensors = [tensor.detach().requires_grad_(needs) for tensor, needs in zip((x, weight), trains)]
    router_scores(*tensors).backward(ds)
    for tensor, needs, gradient in zip(tensors, trains, both):
        assert torch.equal(tensor.grad, gradient) if needs else tensor.grad is None


def test_x_is_saved_in_bf16() -> None:
    """Not as an fp32 copy of twice the size."""
    x, weight, _ = make(torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        router_scores(x, weight)
    assert [tensor.data_ptr() for tensor in saved[:2]] == [x.data_ptr(), weight.data_ptr()]
    assert [tensor.shape for tensor in saved[2:]] == [(7, 6)]


def test_three_parts_hold_every_fp32_number() -> None:
    """hi + mid + lo = w exactly down to 2⁻¹¹⁰, below that to half of bf16's smallest number; mid ≤ 2⁻⁸·w, lo ≤ 2⁻¹⁶·w.

    Random bits, so every exponent and denormal numbers; neighbours of powers of two; halves of bf16's last place.
    """
    random = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1_000_000,), generator=random).to(torch.int32).view(torch.float32)
    powers = torch.ldexp(torch.ones(254), torch.arange(-126, 128)).repeat_interleave(7)
    special = powers.view(torch.int32) + torch.tensor([-1, 0, 1, 2**15 - 1, 2**15, 2**15 + 1, -(2**15)]).repeat(254)
    values = torch.cat([bits, special.to(torch.int32).view(torch.float32)])
    values = values[values.abs() < torch.finfo(torch.bfloat16).max]
    high, middle, low = (part.double() for part in parts_of(values))
    exact = values.double()
    error = (high + middle + low - exact).abs()
    assert error[exact.abs() >= 2.0**-110].max() == 0.0
    assert error.max() <= 2.0**-134
    normal = exact.abs() >= 2.0**-110
    assert (middle.abs() <= 2.0**-8 * exact.abs())[normal].all()
    assert (low.abs() <= 2.0**-16 * exact.abs())[normal].all()


def test_an_infinite_number_is_its_own_high_part() -> None:
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38])
    high, middle, low = parts_of(values)
    assert high.tolist()[:2] == [torch.inf, -torch.inf]
    assert high[2].isnan()
    assert high[3].item() == torch.inf  # more than bf16's largest number
    assert (middle == 0).all()
    assert (low == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_keep_their_bound(kind: str) -> None:
    """The parts in float64: the splitting alone. Then added as a tensor core does, within the bound for truncation.

    On random and realistic inputs the largest error is also within four times the fp32 product's: truncation doubles
    the error of an addition, and a product on the CPU adds in several sums.
    """
    x_TD, weight_ED = inputs(kind)
    exact = x_TD.double() @ weight_ED.double().t()
    size = x_TD.double().abs() @ weight_ED.double().abs().t()
    split = sum(x_TD.double() @ part.double().t() for part in parts_of(weight_ED))
    lost = 2.0**-134 * x_TD.double().abs().sum(dim=1, keepdim=True)
    assert ((split - exact).abs() <= lost + 1e-13 * size).all()
    error = (tensor_core_logits(x_TD, weight_ED).double() - exact).abs()
    assert (error <= logit_bound(x_TD, weight_ED, TRUNCATED)).all()
    plain = (F.linear(x_TD.float(), weight_ED).double() - exact).abs()
    assert (plain <= logit_bound(x_TD, weight_ED, NEAREST)).all()
    if kind in ("random", "realistic"):
        assert error.max() <= 4 * plain.max()


def test_two_parts_would_break_the_bound() -> None:
    """The bound can fail: without lo the error of random inputs exceeds it."""
    x_TD, weight_ED = inputs("random", D=32)
    high, middle, _ = parts_of(weight_ED)
    error = (x_TD.double() @ (high.double() + middle.double() - weight_ED.double()).t()).abs()
    assert (error > logit_bound(x_TD, weight_ED, NEAREST)).any()


def differing_tokens(x_TD: Tensor, weight_ED: Tensor, active: int) -> tuple[int, int]:
    """How many tokens the two products route differently, and how many of them for no tie within the bounds.

    A difference is explained if, at every place, the two experts' biased scores in float64 differ by at most the errors
    of both products: σ has a slope of at most 1/4; σ and the sum with the bias are rounded, 2⁻²³ each.
    """
    bias_E = torch.linspace(0.05, -0.05, len(weight_ED) // 2).repeat_interleave(2)
    logits = F.linear(x_TD.float(), weight_ED), tensor_core_logits(x_TD, weight_ED)
    plain, ours = (route.reference(torch.sigmoid(y), bias_E, active)[0] for y in logits)
    different = (plain != ours).any(dim=1)
    exact = torch.sigmoid(x_TD.double() @ weight_ED.double().t()) + bias_E.double()
    gap_T = (exact.gather(1, plain) - exact.gather(1, ours)).abs().amax(dim=1)
    errors = sum(logit_bound(x_TD, weight_ED, addition).amax(dim=1) / 4 + 2.0**-22 for addition in (NEAREST, TRUNCATED))
    return int(different.sum()), int((different & (gap_T > errors)).sum())


@pytest.mark.parametrize(("experts", "active"), [(128, 8), (256, 4)])
@pytest.mark.parametrize("kind", ["random", "realistic"])
def test_the_same_experts_are_chosen(kind: str, experts: int, active: int) -> None:
    """For all 4096 tokens in order of score, but for ties within the error: those are counted, and here there are few.

    Random weights of deviation 1 and 512 features saturate σ, so that scores tie; realistic ones do not.
    """
    x_TD, weight_ED = inputs(kind, T=4096, E=experts)
    different, unexplained = differing_tokens(x_TD, weight_ED / (16 if kind == "random" else 1), active)
    assert unexplained == 0
    assert different <= 2


def test_near_ties_are_found() -> None:
    """Every other expert adds the products of its neighbour in another order: tokens go elsewhere, each for a tie."""
    x_TD, weight_ED = inputs("realistic", T=1024)
    x_TD[:, 256:] = x_TD[:, :256]
    weight_ED[1::2] = weight_ED[::2].roll(256, dims=1)
    different, unexplained = differing_tokens(x_TD, weight_ED, 8)
    assert different > 0
    assert unexplained == 0
