"""Gradient clipping against sums over every element in Python's float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

from trinity.optim.grad_clip import clip_, global_norm


def make_gradients(dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    torch.manual_seed(3)
    return [
        torch.randn(7, 5).to(dtype),
        None,
        torch.randn(11).to(dtype),
        torch.randn(3, 2, 4, 6).to(dtype),
        torch.tensor(-2.0).to(dtype),
        torch.zeros(0, 4).to(dtype),
    ]


def plain_norm(tensors: list[Tensor | None]) -> float:
    return math.sqrt(math.fsum(v * v for x in tensors if x is not None for v in x.flatten().tolist()))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-6), (torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_norm_is_the_root_of_all_squares(dtype: torch.dtype, bound: float) -> None:
    """fp32 rows of a few elements: some roundings of 2⁻²⁴. bf16 values are exact in fp32."""
    grads = make_gradients(dtype)
    norm = global_norm(iter(grads))
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norm.shape == ()
    assert norm.item() == pytest.approx(plain_norm(grads), rel=bound)


def test_norm_of_nothing_is_zero() -> None:
    assert global_norm([None, None]).item() == 0.0


def test_norm_of_millions_is_accurate() -> None:
    """One fp32 sum over these elements is off by 1e-4 on CPU; sums over rows of 1000 are not."""
    x = torch.randn(4000, 1000, generator=torch.Generator().manual_seed(0))
    assert global_norm([x]).item() == pytest.approx(x.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_clip_multiplies_by_max_norm_over_norm(dtype: torch.dtype) -> None:
    """In place and bit for bit the product in the norm's precision, rounded once."""
    grads, expected = make_gradients(dtype), make_gradients(dtype)
    norm = global_norm(grads)
    clip_(grads, norm, 1.5)
    for got, before in zip(grads, expected):
        assert got is None or torch.equal(got, (before.to(norm.dtype) * (1.5 / norm)).to(dtype))
    # bf16 holds 8 bits, so every element is off by up to 2⁻⁹
    bound = {torch.bfloat16: 2**-9, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    assert plain_norm(grads) == pytest.approx(1.5, rel=bound)


@pytest.mark.parametrize("max_norm", [1.0, 1.0001, 50.0, math.inf])
def test_gradients_within_the_norm_stay_bit_for_bit(max_norm: float) -> None:
    """The first case has a norm of exactly max_norm: an epsilon in the formula would change bits."""
    grads = [torch.tensor([0.6, 0.0]), torch.tensor([[0.0], [0.8]])]
    before = [grad.clone() for grad in grads]
    clip_(grads, torch.tensor(1.0), max_norm)
    assert all(torch.equal(x, y) for x, y in zip(grads, before))


def test_zero_gradients_stay_zero() -> None:
    grads = [torch.zeros(3)]
    clip_(grads, global_norm(grads), 1.0)
    assert grads[0].tolist() == [0.0, 0.0, 0.0]


def test_mixed_precision_gives_float64() -> None:
    grads = [torch.randn(5), torch.randn(5).double()]
    assert global_norm(grads).dtype == torch.float64
    assert global_norm(grads).item() == pytest.approx(plain_norm(grads), rel=1e-14)


def test_dtensors_on_a_mesh_of_one_equal_plain_tensors(mesh) -> None:
    plain = [grad for grad in make_gradients() if grad is not None and grad.ndim]
    sharded = [distribute_tensor(grad.clone(), mesh, [Shard(0)]) for grad in plain]
    norm = global_norm(sharded)
    assert torch.equal(norm, global_norm(plain))
    clip_(plain, norm, 0.5)
    clip_(sharded, norm, 0.5)
    assert all(torch.equal(x, y.full_tensor()) for x, y in zip(plain, sharded))
