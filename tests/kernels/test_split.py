"""split_projection gives the gradients of torch's split, bit for bit, written into one tensor where that is possible.

Here with the reference ops; test_qk_norm_triton.py and test_gate_triton.py have the same for Triton.

Shapes: B batch, S sequence, H heads, C head width; a projection of queries, keys, values and gate.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trinity_kernels import qk_norm, sigmoid_gate, split, split_projection

B, S, C = 2, 7, 8
WIDTHS = (4 * C, 2 * C, 2 * C, 4 * C)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
EPS = 1e-5


def plain(x: Tensor, widths: tuple[int, ...]) -> tuple[tuple[Tensor, ...], tuple[None, ...]]:
    """torch's split, whose backward concatenates."""
    return x.split(widths, dim=-1), (None,) * len(widths)


def make(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The projection's input, its output and the gain of both norms."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(B, S, sum(WIDTHS), generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    gain = 1 + 0.3 * torch.randn(C, generator=random, dtype=torch.float64)
    return x, x * 2, gain.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()


def sublayer(splitter: Callable, projection: Tensor, gain_C: Tensor) -> Tensor:
    """What attention does with a projection; the mixing of values stands for attention itself."""
    (q, k, v, gate), into = splitter(projection, WIDTHS)
    angles = torch.arange(S * C // 2, dtype=gain_C.dtype).view(1, S, 1, C // 2)
    rotation = (angles.cos(), angles.sin())
    q_BSHC = qk_norm(q.unflatten(-1, (4, C)), gain_C, EPS, rotation, into[0])
    k_BSGC = qk_norm(k.unflatten(-1, (2, C)), gain_C, EPS, None, into[1])
    mixed = q_BSHC + (k_BSGC * v.unflatten(-1, (2, C))).repeat_interleave(2, dim=2)
    return sigmoid_gate(mixed.flatten(-2), gate, into[3])


def gradients(splitter: Callable, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of the projection's input and the gain."""
    x, projection, gain_C = make(dtype)
    out = sublayer(splitter, projection, gain_C)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return torch.autograd.grad(out, (x, gain_C), dy)


@pytest.fixture(autouse=True)
def _on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "DEVICES", ("cpu", "cuda"))


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """For each backward of a split: the parts whose gradients arrived in their slices."""
    passes: list[list[int]] = []
    original = split._WholeGradient.complete

    def complete(self: split._WholeGradient, grads: tuple[Tensor | None, ...]) -> Tensor:
        slices = self._slices
        passes.append([i for i, (grad, part) in enumerate(zip(grads, slices)) if split._is_slice(grad, part)])
        return original(self, grads)

    monkeypatch.setattr(split._WholeGradient, "complete", complete)
    return passes


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_bits_of_torchs_split(dtype: torch.dtype, in_place: list) -> None:
    """Only the values' gradient is copied."""
    one, other = (gradients(splitter, dtype) for splitter in (split_projection, plain))
    assert in_place == [[0, 1, 3]]
    assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_only_the_values_gradient_is_copied() -> None:
    """torch's split concatenates; here one copy remains. The ops themselves copy nothing in fp32."""

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name() in ("aten::cat", "aten::copy_"):
                names.append(func.name())
            return func(*args, **(kwargs or {}))

    counted = []
    for splitter in (split_projection, plain):
        names: list[str] = []
        x, projection, gain_C = make(torch.float32)
        out = sublayer(splitter, projection, gain_C).sum()
        with Copies():
            torch.autograd.grad(out, (x, gain_C))
        counted.append(names)
    assert counted == [["aten::copy_"], ["aten::cat"]]


def test_gradcheck() -> None:
    """Also with gradients that are not there, and twice for the same bits, which gradcheck does by itself."""
    _, projection, gain_C = make(torch.float64)
    inputs = projection.detach()[:, :1].clone().requires_grad_(), gain_C

    def function(x: Tensor, gain_C: Tensor) -> Tensor:
        (q, _, v, gate), into = split_projection(x, WIDTHS)
        mixed = qk_norm(q.unflatten(-1, (4, C)), gain_C, EPS, None, into[0]).flatten(-2) * v.repeat(1, 1, 2)
        return sigmoid_gate(mixed, gate, into[3])

    torch.autograd.gradcheck(function, inputs)


def uses(case: str, splitter: Callable, x: Tensor) -> Tensor:
    """Ways to use a projection's parts that are not attention's."""
    (q, k, v, gate), into = splitter(x, WIDTHS)
    norm = partial(qk_norm, eps=EPS, gain_C=torch.linspace(0.5, 1.5, C, dtype=x.dtype))
    q, k = q.unflatten(-1, (4, C)), k.unflatten(-1, (2, C))
    first = norm(q, into=into[0])
    return {
        "a part without a use": lambda: first.sum() + v.square().sum(),
        "no part with a slice": lambda: v.square().sum() + gate.square().sum(),
        "a use that asks for no slice": lambda: first.square().sum() + q.square().sum(),
        "two uses that ask for one slice": lambda: first.square().sum() + norm(q, into=into[0]).pow(3).sum(),
        "two uses, one a part of the part": lambda: first.square().sum() + q[..., 0].square().sum(),
        "another part's slice": lambda: first.sum() + norm(k, into=into[2]).pow(3).sum() + v.square().sum(),
        "the transposed part": lambda: norm(
            q.transpose(1, 2).reshape(q.shape), into=splitter(x, WIDTHS)[1][0]
        ).pow(3).sum() + first.square().sum(),
    }[case]()  # fmt: skip


CASES = [
    "a part without a use", "no part with a slice", "a use that asks for no slice", "two uses that ask for one slice",
    "two uses, one a part of the part", "another part's slice", "the transposed part",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_use_of_the_parts(case: str) -> None:
    """float64, the same sums in the same order: the same bits."""
    grads = []
    for splitter in (split_projection, plain):
        x, projection, _ = make(torch.float64)
        grads += torch.autograd.grad(uses(case, splitter, projection), x)
    assert torch.equal(*grads)


def test_several_passes_through_one_graph() -> None:
    """retain_graph: passes that end at a part or at the gain, then whole ones; earlier results keep their values."""
    results = []
    for splitter in (split_projection, plain):
        x, projection, gain_C = make(torch.float64)
        (q, *_), into = splitter(projection, WIDTHS)
        out = qk_norm(q.unflatten(-1, (4, C)), gain_C, EPS, None, into[0])
        got = [torch.autograd.grad(out.square().sum(), q, retain_graph=True)[0]]
        got += torch.autograd.grad(q, x, got[0], retain_graph=True)  # the slice itself, from an earlier pass
        got += [torch.autograd.grad(out.pow(n).sum(), (x, gain_C)[i], retain_graph=True)[0] for i in (0, 1, 0)
                for n in (3, 4)]  # fmt: skip
        out.sum().backward(retain_graph=True)
        out.pow(3).sum().backward()
        results.append([*got, x.grad, gain_C.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_hooks_on_a_part() -> None:
    """A hook that returns another gradient, one that changes it in place, and a retained gradient."""
    results = []
    for splitter in (split_projection, plain):
        x, projection, gain_C = make(torch.float64)
        (q, k, *_), into = splitter(projection, WIDTHS)
        q.register_hook(lambda grad: grad * 3)
        k.register_hook(lambda grad: grad.mul_(5))
        k.retain_grad()
        out = [
            qk_norm(part.unflatten(-1, (-1, C)), gain_C, EPS, None, place).pow(3).sum()
            for part, place in zip((q, k), into)
        ]
        sum(out).backward()
        results.append([x.grad, k.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def contexts() -> tuple:
    """Selective checkpointing that keeps the products of the mixing and recomputes the rest."""
    save, recompute = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
    return create_selective_checkpoint_contexts(
        lambda _context, op, *_args, **_options: save if op.name() == "aten::repeat_interleave" else recompute
    )


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_checkpointing(dtype: torch.dtype, selective: bool, in_place: list) -> None:
    """Backward runs the nodes of the first forward, also where the recomputed forward makes slices of its own."""
    x, projection, gain_C = make(dtype)
    options = {"context_fn": contexts} if selective else {}
    out = checkpoint(partial(sublayer, split_projection), projection, gain_C, use_reentrant=False, **options)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for grad, exact in zip(torch.autograd.grad(out, (x, gain_C), dy), gradients(plain, dtype)):
        assert torch.equal(grad, exact)
    assert in_place == [[0, 1, 3]]


def test_torchs_split_where_slices_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients, for meta and fake tensors, and on devices where they do not pay."""
    _, projection, _ = make(torch.float32)
    with torch.no_grad():
        assert split_projection(projection, WIDTHS)[1] == (None,) * 4
    assert split_projection(projection.detach(), WIDTHS)[1] == (None,) * 4
    assert split_projection(projection.detach().to("meta").requires_grad_(), WIDTHS)[1] == (None,) * 4
    with FakeTensorMode():
        assert split_projection(torch.empty(B, sum(WIDTHS), requires_grad=True), WIDTHS)[1] == (None,) * 4
    monkeypatch.setattr(split, "DEVICES", ("cuda",))
    assert split_projection(projection, WIDTHS)[1] == (None,) * 4


def test_compiled_code_has_torchs_split() -> None:
    """It is one graph; fp32 sums in another order: 2⁻²⁴ times a few terms."""
    x, projection, gain_C = make(torch.float32)

    def function(projection: Tensor, gain_C: Tensor) -> Tensor:
        (q, _, v, gate), into = split_projection(projection, WIDTHS)
        q_BSHC = qk_norm(q.unflatten(-1, (4, C)), gain_C, EPS, None, into[0])
        return sigmoid_gate(q_BSHC.flatten(-2) * v.repeat(1, 1, 2), gate, into[3])

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got, exact = (
        torch.autograd.grad(run(projection, gain_C).sum(), (x, gain_C), retain_graph=True)
        for run in (compiled, function)
    )
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(got, exact))


def test_second_derivatives() -> None:
    """create_graph: the split alone, because the ops have one derivative; the gradient of a gradient is a constant."""
    x = torch.randn(3, sum(WIDTHS), dtype=torch.float64, requires_grad=True)
    (q, k, _, gate), into = split_projection(x, WIDTHS)
    (grad,) = torch.autograd.grad((q * gate).sum() + k.pow(3).sum(), x, create_graph=True)
    assert into[0].whole._whole is None
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    q, k, v, gate = x.detach().split(WIDTHS, dim=-1)
    assert torch.allclose(second, torch.cat((2 * q, 36 * k**3, 0 * v, 2 * gate), dim=-1), rtol=1e-14, atol=0)


def test_no_tokens() -> None:
    x = torch.empty(0, S, sum(WIDTHS), requires_grad=True)
    (q, *_), into = split_projection(x, WIDTHS)
    qk_norm(q.unflatten(-1, (4, C)), torch.ones(C), EPS, None, into[0]).sum().backward()
    assert x.grad.shape == x.shape


def test_the_gradient_is_freed_after_its_pass() -> None:
    """The graph holds no memory of it, although it may be kept for another pass."""
    x, projection, gain_C = make(torch.float32)
    (q, *_), into = split_projection(projection, WIDTHS)
    out = qk_norm(q.unflatten(-1, (4, C)), gain_C, EPS, None, into[0]).sum()
    out.backward(retain_graph=True)
    assert into[0].whole._whole is None
    assert into[0].whole._slices == ()
    assert x.grad is not None
