"""linear and its products against float64: by torch and oneDNN, with bf16 arithmetic and (simulated) without.

Shapes: ... any leading dimensions, I input width, O output width.
"""

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trinity_kernels import expert_mlp, linear, linear_cross_entropy
from trinity_kernels.newton_schulz import newton_schulz
from trinity_kernels.probe import probed

MODULE = importlib.import_module("trinity_kernels.linear")  # the package's attribute of that name is the function
I, O = 48, 24


@pytest.fixture(params=[True, False], ids=["bf16 arithmetic", "widened"])
def has_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Let linear run as on a CPU with bf16 arithmetic, or as on one without; the product works either way."""
    monkeypatch.setattr(MODULE, "_cpu_has_bf16", lambda: request.param)
    return request.param


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take oneDNN's products in fp32."""
    if not MODULE.has_onednn():
        pytest.skip("this torch has no product of oneDNN")
    monkeypatch.setattr(MODULE, "_fp32_products", "onednn")


def make(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, the weight and an incoming gradient."""
    random = torch.Generator().manual_seed(0)
    sizes = [(*shape, I), (O, I), (*shape, O)]
    x, weight_OI, dy = (torch.randn(size, generator=random, dtype=torch.float64).to(dtype) for size in sizes)
    return x.requires_grad_(), weight_OI.requires_grad_(), dy


def exact_results(x: Tensor, weight_OI: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx and dW in float64."""
    x, weight_OI, dy = x.double(), weight_OI.double(), dy.double()
    return [x @ weight_OI.t(), dy @ weight_OI, torch.einsum("no,ni->oi", dy.reshape(-1, O), x.reshape(-1, I))]


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (0,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_matches_float64(shape: tuple[int, ...], dtype: torch.dtype, has_bf16: bool) -> None:
    """bf16: the float64 result rounded once, 2⁻⁹ of each number, plus the error of fp32 sums of 48 products."""
    x, weight_OI, dy = make(shape, dtype)
    assert MODULE.multiplies_in_fp32(x) == (dtype == torch.bfloat16 and not has_bf16)
    y = linear(x, weight_OI)
    got = [y, *torch.autograd.grad(y, (x, weight_OI), dy)]
    relative, absolute = {
        torch.float64: (0, 1e-13),
        torch.float32: (0, 1e-4),
        torch.bfloat16: (2**-8, 1e-4),
    }[dtype]
    for actual, exact in zip(got, exact_results(x, weight_OI, dy)):
        assert actual.dtype == dtype
        assert torch.allclose(actual.double(), exact, rtol=relative, atol=absolute)


@pytest.mark.parametrize("trains", [(True, False), (False, True)])
@pytest.mark.usefixtures("has_bf16")
def test_frozen_inputs(trains: tuple[bool, bool]) -> None:
    """An input that needs no gradient gets none; the other gradient is the same."""
    x, weight_OI, dy = make((7,), torch.bfloat16)
    both = torch.autograd.grad(linear(x, weight_OI), (x, weight_OI), dy)
    inputs = [tensor.detach().requires_grad_(needs) for tensor, needs in zip((x, weight_OI), trains)]
    linear(*inputs).backward(dy)
    for tensor, needs, gradient in zip(inputs, trains, both):
        assert torch.equal(tensor.grad, gradient) if needs else tensor.grad is None


def test_the_operands_are_saved_in_their_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as fp32 copies, which would double the memory of activations."""
    monkeypatch.setattr(MODULE, "_cpu_has_bf16", lambda: False)
    x, weight_OI, _ = make((7,), torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        linear(x, weight_OI)
    assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr(), weight_OI.data_ptr()]


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (0,), (300,)])
@pytest.mark.usefixtures("by_onednn")
def test_onednn_matches_float64(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32: results of oneDNN, within the error of fp32 sums of up to 300 products; float64 and bf16 are torch's."""
    x, weight_OI, dy = make(shape, torch.float32)
    calls = []
    onednn = MODULE._onednn
    monkeypatch.setattr(MODULE, "_onednn", lambda *args: calls.append(args) or onednn(*args))
    y = linear(x, weight_OI)
    got = [y, *torch.autograd.grad(y, (x, weight_OI), dy)]
    assert len(calls) == (3 if x.numel() else 0)
    for actual, exact in zip(got, exact_results(x, weight_OI, dy)):
        assert (actual.dtype, actual.shape) == (torch.float32, exact.shape)
        assert torch.allclose(actual.double(), exact, rtol=0, atol=3e-4)
    for dtype in (torch.float64, torch.bfloat16):
        x, weight_OI, dy = make(shape, dtype)
        count = len(calls)
        linear(x, weight_OI).backward(dy)
        assert len(calls) == count


@pytest.mark.parametrize("products", ["torch", "onednn"])
def test_products_of_views_repeat_their_bits(request: pytest.FixtureRequest, products: str) -> None:
    """Transposed and strided operands, a given output, and twice the same call."""
    if products == "onednn":
        request.getfixturevalue("by_onednn")
    random = torch.Generator().manual_seed(0)
    grad, x = torch.randn(60, O * 2, generator=random)[:, ::2], torch.randn(I, 60, generator=random).t()
    weight = torch.randn(O, I, generator=random)
    for function, a, b, exact in [
        (MODULE.linear_forward, x, weight, x.double() @ weight.double().t()),
        (MODULE.linear_grad_input, grad, weight, grad.double() @ weight.double()),
        (MODULE.linear_grad_weight, grad, x, grad.double().t() @ x.double()),
    ]:
        result = function(a, b)
        assert torch.allclose(result.double(), exact, rtol=0, atol=1e-4)
        assert torch.equal(result, function(a, b))
        out = torch.full(exact.shape, torch.nan)
        assert function(a, b, out=out) is out
        assert torch.allclose(out.double(), exact, rtol=0, atol=1e-4)


def test_a_torch_without_the_private_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is neither chosen nor allowed."""

    def missing(*_: object) -> None:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    monkeypatch.setattr(MODULE, "_onednn", missing)
    monkeypatch.setattr(MODULE, "_cpu", lambda: ("AuthenticAMD", MODULE.ZEN_5))
    monkeypatch.setattr(MODULE, "has_onednn", probed(MODULE.has_onednn.__wrapped__))  # which has not run yet
    assert MODULE.fastest_fp32_products() == "torch"
    with pytest.raises(ValueError, match="this torch has no product of oneDNN; use torch"):
        MODULE.set_fp32_products("onednn")
    with pytest.raises(ValueError, match="mkl is not known; use one of torch, onednn"):
        MODULE.set_fp32_products("mkl")


@pytest.mark.parametrize(
    ("cpu", "mkl", "fastest"),
    [
        (("AuthenticAMD", 26), True, "onednn"), (("AuthenticAMD", 25), True, "torch"),
        (("AuthenticAMD", 26), False, "torch"), (("GenuineIntel", 26), True, "torch"), (("", 0), True, "torch"),
    ],
)  # fmt: skip
def test_the_fastest_products_follow_from_the_processor(
    monkeypatch: pytest.MonkeyPatch, cpu: tuple[str, int], mkl: bool, fastest: str
) -> None:
    monkeypatch.setattr(MODULE, "_cpu", lambda: cpu)
    monkeypatch.setattr(MODULE, "has_onednn", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert MODULE.fastest_fp32_products() == fastest


@pytest.mark.parametrize(
    ("text", "cpu"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\n\nvendor_id\t: AuthenticAMD\n", ("AuthenticAMD", 26)),
        ("processor\t: 0\nBogoMIPS\t: 243.75\n", ("", 0)), ("", ("", 0)), (None, ("", 0)),
    ],
)  # fmt: skip
def test_the_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, cpu: tuple[str, int]) -> None:
    """As /proc/cpuinfo has it: of x86-64, of Arm, empty, missing."""
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr("builtins.open", lambda _name, opened=open: opened(path))
    assert MODULE._cpu() == cpu


@pytest.mark.usefixtures("by_onednn")
def test_every_op_takes_the_chosen_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts, head and Newton-Schulz: without torch.mm, and within fp32's error of its results."""
    random = torch.Generator().manual_seed(0)
    x, w1, w2 = (torch.randn(shape, generator=random) for shape in ((40, 16), (4, 2, 8, 16), (4, 16, 8)))
    indices = torch.rand(40, 4, generator=random).argsort(dim=1)[:, :2]
    head, targets = torch.randn(50, 16, generator=random), torch.randint(50, (40,), generator=random)
    triples = [(3.0, -3.0, 1.0)] * 2

    def results() -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, w1, w2, head)]
        y = expert_mlp(*leaves[:3], indices, torch.full((40, 2), 0.5))
        loss = linear_cross_entropy(y, leaves[3], targets, 1e-3)[0]
        orthogonal = [newton_schulz(m / m.norm(), triples) for m in (w1.flatten(1, 2)[:1], w2[:1], w1[0])]
        return [y.detach(), *torch.autograd.grad(loss, leaves), *orthogonal]

    with monkeypatch.context() as patch:
        patch.setattr(MODULE, "_fp32_products", "torch")
        expected = results()
    for name in ("mm", "bmm", "baddbmm", "matmul"):
        monkeypatch.setattr(torch, name, None)
    for got, wanted in zip(results(), expected):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()
