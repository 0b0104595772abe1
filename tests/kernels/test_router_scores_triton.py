"""router_scores in Triton: parts bit for bit, scores and gradients within the bounds of router_scores.py.

Shapes: T tokens, D width, E experts.
"""

import pytest
import torch
from torch import Tensor

from tests.kernels.three_parts import KINDS, TRUNCATED, inputs, logit_bound, parts_of
from tests.kernels.triton_case import DEVICE, assert_close, relative_error
from trinity.config.model import ModelConfig
from trinity.models.moe import Router
from trinity_kernels import router_scores
from trinity_kernels.router_scores_triton import launch_scores, launch_split

SIZES = [(1, 1, 1), (7, 48, 16), (65, 130, 128), (130, 64, 5), (3, 40, 300), (0, 16, 4), (129, 96, 64)]


def make(T: int, D: int, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """x in bf16, an fp32 weight, and a gradient of the scores."""
    random = torch.Generator().manual_seed(T + E)
    x, weight, ds = (torch.randn(shape, generator=random).to(DEVICE) for shape in ((T, D), (E, D), (T, E)))
    return x.bfloat16().requires_grad_(), (weight / 8).requires_grad_(), ds


def exact_gradients(scores: Tensor, ds: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """g in fp32 as the kernel computes it; dx and dW from it in float64."""
    g = ds * (scores * (1 - scores)).detach()
    return g, g.double() @ weight.double(), g.double().t() @ x.double()


@pytest.mark.parametrize("columns", [48, 5, 1])
def test_parts_bit_for_bit(columns: int) -> None:
    """Of any numbers, infinite and NaN ones too: a weight's one above the other, those of g side by side."""
    random = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (500, columns), generator=random).to(torch.int32)
    values = bits.view(torch.float32)
    values[0, 0], values[1, 0], values[2, 0] = torch.inf, -torch.inf, torch.nan
    high, middle, low = parts_of(values)
    ours = launch_split(values.to(DEVICE)).cpu()
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours.nan_to_num(7.0), torch.cat([high, high, middle, low]).nan_to_num(7.0))

    ds, scores = torch.randn(500, columns, generator=random), torch.rand(500, columns, generator=random)
    high, middle, low = parts_of(ds * (scores * (1 - scores)))
    expected = torch.cat([low, middle, high, high], dim=1)
    assert torch.equal(launch_split(ds.to(DEVICE), scores.to(DEVICE)).cpu(), expected)


@pytest.mark.parametrize(("T", "D", "E"), SIZES)
def test_matches_float64(T: int, D: int, E: int) -> None:
    """Scores and dW as from fp32 products, 1e-6; dx rounded to bf16, 2⁻⁸ of each number and what is left out.

    fp32's own error is beside it: three parts are at most twice as far from float64, and 1e-7, the last place.
    """
    x, weight, ds = make(T, D, E)
    scores = router_scores.triton(x, weight)
    grad_x, grad_weight = torch.autograd.grad(scores, (x, weight), ds)
    assert (scores.dtype, grad_x.dtype, grad_weight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    exact = torch.sigmoid(x.double() @ weight.double().t())
    g, exact_x, exact_weight = exact_gradients(scores, ds, x, weight)
    assert_close(scores, exact, 1e-6)
    assert_close(grad_weight, exact_weight, 1e-6)
    left_out = 2.0**-14 * (g.double().abs() @ weight.double().abs()) + 1e-30
    assert ((grad_x.double() - exact_x).abs() <= 2.0**-8 * exact_x.abs() + left_out).all()
    plain = router_scores.reference(x, weight)
    for ours, theirs, value in (
        (scores, plain, exact),
        (grad_weight, torch.autograd.grad(plain, weight, ds)[0], exact_weight),
    ):
        assert relative_error(ours, value) <= 2 * relative_error(theirs, value) + 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_scores_keep_the_bound(kind: str) -> None:
    """Each score: σ has a slope of at most 1/4, and is rounded to 2⁻²². Logits of any size, wide ones included."""
    x, weight = inputs(kind, T=33, D=128, E=20)
    scores = router_scores.triton(x.to(DEVICE), weight.to(DEVICE)).cpu()
    exact = torch.sigmoid(x.double() @ weight.double().t())
    assert ((scores.double() - exact).abs() <= logit_bound(x, weight, TRUNCATED) / 4 + 2.0**-22).all()


def test_several_blocks_of_experts_and_columns() -> None:
    """With tiles of 16: the same scores, to the order of a sum of 100."""
    x, weight, _ = make(40, 100, 40)
    tile = {"BLOCK_T": 16, "BLOCK_E": 16, "BLOCK_K": 16}
    small = launch_scores(x.detach(), launch_split(weight.detach()), tile)
    assert_close(small, torch.sigmoid(x.double() @ weight.double().t()), 1e-6)


def test_infinite_and_nan_numbers_pass_through() -> None:
    """As in fp32: ±∞ gives 0 or 1, 0·∞ and NaN give NaN, in that expert or that token alone."""
    x, weight = torch.ones(3, 32), torch.full((5, 32), 0.01)
    x[1, 3], x[2, 0] = 0.0, torch.nan
    weight[0, 3], weight[1, 3], weight[2, 5] = torch.inf, -torch.inf, torch.nan
    scores = router_scores.triton(x.bfloat16().to(DEVICE), weight.to(DEVICE)).cpu()
    plain = router_scores.reference(x.bfloat16(), weight)
    assert torch.equal(scores.isnan(), plain.isnan())
    assert scores[0, :2].tolist() == [1.0, 0.0]
    assert scores[1, :3].isnan().all()
    assert torch.allclose(scores[:2, 3:], plain[:2, 3:], rtol=1e-6)


@pytest.mark.parametrize("trains", [(True, False), (False, True)])
def test_frozen_inputs(trains: tuple[bool, bool]) -> None:
    """An input that needs no gradient gets none; the other gradient is the same."""
    x, weight, ds = make(7, 48, 16)
    both = torch.autograd.grad(router_scores.triton(x, weight), (x, weight), ds)
    tensors = [tensor.detach().requires_grad_(needs) for tensor, needs in zip((x, weight), trains)]
    router_scores.triton(*tensors).backward(ds)
    for tensor, needs, gradient in zip(tensors, trains, both):
        assert torch.equal(tensor.grad, gradient) if needs else tensor.grad is None


def test_a_weight_in_bf16() -> None:
    """A whole model in bf16: its parts mid and lo are 0, and its gradient is bf16."""
    x, weight, ds = make(7, 48, 16)
    narrow = weight.detach().bfloat16().requires_grad_()
    scores = router_scores.triton(x, narrow)
    assert torch.equal(scores, router_scores.triton(x, narrow.float()))
    assert torch.autograd.grad(scores, narrow, ds)[0].dtype == torch.bfloat16


def test_x_is_saved_in_bf16() -> None:
    """And the weight's parts, the scores; no fp32 copy of x."""
    x, weight, _ = make(7, 48, 16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        router_scores.triton(x, weight)
    shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in saved]
    assert shapes == [((7, 16), torch.float32), ((7, 48), torch.bfloat16), ((64, 48), torch.bfloat16)]


def test_strides_and_repetition() -> None:
    """Columns of a wider x, a transposed weight, a gradient of stride zero; the same bits every time."""
    x, weight, _ = make(33, 96, 32)
    arguments = x.detach()[:, ::2], weight.detach()[:, :48]
    contiguous = [tensor.contiguous().requires_grad_() for tensor in arguments]
    strided = [tensor.requires_grad_() for tensor in arguments]
    results = []
    for tensors in (contiguous, strided, strided):
        scores = router_scores.triton(*tensors)
        results.append((scores, *torch.autograd.grad(scores.sum(), tensors)))
    for first, *others in zip(*results):
        assert all(torch.equal(first, other) for other in others)


def test_the_router_in_triton_is_the_router_in_torch() -> None:
    """As FSDP gives it: x in bf16, the weight in fp32. The same experts, and gates, statistics and gradients to 1e-6.

    dx is rounded to bf16 once in both, from sums that differ by 2⁻¹⁴ at most: a last place here and there.
    """
    config = ModelConfig(width=48, experts=16, active_experts=4)
    x = make(40, 48, 16)[0]
    random = torch.Generator().manual_seed(0)
    weight_ED, bias_E = torch.randn(16, 48, generator=random) / 8, torch.randn(16, generator=random) / 8
    results = []
    for kernel in ("triton", "reference"):
        router = Router(config, kernel).to(DEVICE)
        router.weight.data = weight_ED.to(DEVICE)
        gates_TK, _, indices_TK, routing = router(x, bias_E.to(DEVICE), 2)
        total = (gates_TK * torch.arange(4, device=DEVICE)).sum() + routing.sequence_loss_B.sum()
        grad_x, grad_weight = torch.autograd.grad(total, (x, router.weight))
        floats = gates_TK, routing.sequence_loss_B, routing.entropy_sum, grad_weight
        results.append((indices_TK, routing.counts_E, floats, grad_x))
    ours, theirs = results
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    for got, expected in zip(ours[2], theirs[2]):
        assert_close(got, expected, 1e-6)
    assert_close(ours[3], theirs[3], 2.0**-10)


def test_refuses_other_dtypes() -> None:
    """They are torch's products."""
    x, weight, _ = make(7, 48, 16)
    with pytest.raises(ValueError, match="it takes x in bf16, not"):
        router_scores(x.float(), weight, kernel="triton")


@pytest.mark.parametrize("T", [0, 7])
def test_opcheck(T: int) -> None:
    """Schema, fake tensors, autograd registration and tracing, by torch's own checker."""
    x, weight, _ = make(T, 48, 16)
    torch.library.opcheck(torch.ops.trinity.router_scores_triton.default, (x, weight))
