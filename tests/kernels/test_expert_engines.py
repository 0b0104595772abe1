"""Every engine of trinity_kernels.expert_engines against the float64 reference, output and gradients.

grouped_mm runs everywhere; megablocks and transformer_engine need their package and a GPU, and are skipped otherwise.

Shapes: T tokens, D width, E experts, F expert width, K active experts.
"""

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_case import DEVICE, relative_error
from trinity_kernels import expert_mlp
from trinity_kernels.expert_engines import ENGINES, check_engine, engine

# fp32: rounding 2⁻²⁴ in sums of a hundred terms; bf16: 2⁻⁹ in gate, up, their product, y, and again in backward
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
DTYPES = {"grouped_mm": [torch.bfloat16] if DEVICE == "cuda" else list(BOUNDS)}
CASES = [(1, 1, 7), (4, 4, 1), (4, 2, 65), (7, 3, 63), (128, 8, 64)]  # E, K, T
D, F = 40, 24
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@pytest.fixture(params=ENGINES)
def name(request: pytest.FixtureRequest) -> str:
    """Each engine that can run here."""
    try:
        check_engine(request.param, DEVICE)
    except ValueError as error:
        pytest.skip(str(error))
    return request.param


def make(E: int, K: int, T: int, dtype: torch.dtype) -> list[Tensor]:
    """x, gate_up, down, indices (distinct within a token) and gates; all but the indices require gradients."""
    random = torch.Generator().manual_seed(1000 * E + 100 * K + T)
    x_TD, s_TK = torch.randn(T, D, generator=random), torch.rand(T, K, generator=random)
    w1, w2 = torch.randn(E, 2, F, D, generator=random) / D**0.5, torch.randn(E, D, F, generator=random)
    indices_TK = torch.rand(T, E, generator=random).argsort(dim=1)[:, :K].to(DEVICE)
    tensors = [x_TD.to(dtype), w1.to(dtype), w2.to(dtype), indices_TK, s_TK]
    return [x.to(DEVICE).requires_grad_() if x.is_floating_point() else x for x in tensors]


def run(function: Callable[..., Tensor], inputs: list[Tensor], dy_TD: Tensor) -> list[Tensor]:
    """Output and the gradients of x, gate_up, down and gates."""
    y_TD = function(*inputs, rows=(inputs[3] >= 0).sum().item())
    return [y_TD.detach(), *torch.autograd.grad(y_TD, [x for x in inputs if x.requires_grad], dy_TD.to(y_TD.dtype))]


def to_float64(inputs: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs]


def compare(name: str, inputs: list[Tensor], dy_TD: Tensor | None = None) -> list[Tensor]:
    dtype = inputs[0].dtype
    if dy_TD is None:
        dy_TD = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    got, exact = run(engine(name), inputs, dy_TD), run(expert_mlp.reference, to_float64(inputs), dy_TD)
    assert [x.dtype for x in got] == [dtype, dtype, dtype, dtype, torch.float32]
    errors = [relative_error(a, b) for a, b in zip(got, exact)]
    assert all(error <= BOUNDS[dtype] for error in errors), errors
    return got


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("sizes", CASES)
def test_matches_the_reference(name: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Up to 128 experts of 4 rows on average; random gradients, and a gradient of stride zero as from a sum."""
    if dtype not in DTYPES.get(name, [torch.bfloat16]):
        pytest.skip(f"{name} does not take {dtype} here")
    compare(name, make(*sizes, dtype))
    compare(name, make(*sizes, dtype), torch.ones((), device=DEVICE, dtype=dtype).expand(sizes[2], D))


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_remote_choices_and_empty_experts(name: str, share: float) -> None:
    """Two experts of six are chosen; some or all choices are −1 with gates of NaN, which must not be read."""
    inputs = make(6, 2, 33, DTYPES.get(name, [torch.bfloat16])[0])
    inputs[3] = inputs[3] % 2 + torch.tensor([0, 3], device=DEVICE)
    remote_TK = (torch.rand(33, 2, generator=torch.Generator().manual_seed(1)) < share).to(DEVICE)
    inputs[3] = inputs[3].masked_fill(remote_TK, -1)
    inputs[4] = inputs[4].detach().masked_fill(remote_TK, torch.nan).requires_grad_()
    got = compare(name, inputs)
    assert got[4][remote_TK].eq(0).all()
    assert all(gradient[[2, 5]].eq(0).all() for gradient in got[2:4])


def test_no_tokens(name: str) -> None:
    """Zeros for every gradient, and none of them None."""
    got = compare(name, make(4, 2, 0, DTYPES.get(name, [torch.bfloat16])[0]))
    assert [x.shape for x in got] == [(0, D), (0, D), (4, 2, F, D), (4, D, F), (0, 2)]


def test_repetition_gives_the_same_bits(name: str) -> None:
    inputs = make(7, 3, 63, DTYPES.get(name, [torch.bfloat16])[0])
    first, second = (run(engine(name), inputs, torch.ones_like(inputs[0])) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_unsupported_arguments_of_grouped_mm() -> None:
    inputs = make(4, 2, 7, torch.float32)
    with pytest.raises(ValueError, match=r"takes .*bfloat16.* not torch\.float64; use auto"):
        engine("grouped_mm")(*to_float64(inputs))
    with pytest.raises(ValueError, match="not 39 numbers"):
        engine("grouped_mm")(*[x.to(torch.bfloat16) if x.is_floating_point() else x for x in drop_one_column(inputs)])


def drop_one_column(inputs: list[Tensor]) -> list[Tensor]:
    """Rows that are no multiple of 16 bytes."""
    x, gate_up, down, *others = inputs
    return [x[:, :39].contiguous(), gate_up[..., :39].contiguous(), down[:, :39].contiguous(), *others]


@pytest.mark.parametrize(
    ("name", "needs"), [("megablocks", "needs megablocks"), ("transformer_engine", "needs transformer_engine.pytorch")]
)
def test_a_missing_package_is_named(name: str, needs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None in sys.modules makes an import fail, installed or not; one sentence, with the command."""
    monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: check_engine(name, "cuda"), lambda: engine(name)(*make(4, 2, 7, torch.float32))):
        with pytest.raises(ValueError, match=needs) as caught:
            call()
        assert "pip install" in str(caught.value)
        assert "\n" not in str(caught.value)


class FakeGroupedGemm(ModuleType):
    """Stands in for grouped_gemm.ops as MegaBlocks calls it: sizes on the host, weights transposed."""

    @staticmethod
    def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
        assert batch_sizes.device.type == "cpu"
        assert batch_sizes.dtype == torch.int64
        assert trans_b
        return torch.cat([rows @ weight.t() for rows, weight in zip(a.split(batch_sizes.tolist()), b)])


class FakeGroupedLinear(torch.nn.Module):
    """Stands in for te.pytorch.GroupedLinear as documented: one parameter per expert, sizes as a list."""

    def __init__(self, num_gemms: int, in_features: int, out_features: int, *, bias: bool, **options) -> None:
        super().__init__()
        assert not bias
        self.num_gemms = num_gemms
        for index in range(num_gemms):
            weight = torch.empty(out_features, in_features, dtype=options["params_dtype"], device=options["device"])
            self.register_parameter(f"weight{index}", torch.nn.Parameter(weight))

    def forward(self, x: Tensor, m_splits: list[int]) -> Tensor:
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        return torch.cat([rows @ weight.t() for rows, weight in zip(x.split(m_splits), weights)])


@pytest.mark.parametrize("name", ["megablocks", "transformer_engine"])
def test_arguments_passed_to_a_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is replaced by a loop on the CPU that checks its arguments; gradients match the reference."""
    module = sys.modules[engine(name).__module__]
    package = ModuleType("te")
    package.GroupedLinear = FakeGroupedLinear
    monkeypatch.setattr(module, "package", lambda: FakeGroupedGemm("ops") if name == "megablocks" else package)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True))
    if name == "transformer_engine":
        monkeypatch.setattr(module, "_shell", module._shell.__wrapped__)
    inputs = [x.cpu().detach().requires_grad_(x.requires_grad) for x in make(7, 3, 63, torch.bfloat16)]
    dy_TD = torch.randn(63, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = run(engine(name), inputs, dy_TD)
    monkeypatch.undo()
    for a, b in zip(got, run(expert_mlp.reference, to_float64(inputs), dy_TD)):
        assert relative_error(a, b) <= BOUNDS[torch.bfloat16]
