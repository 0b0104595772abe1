"""custom_op: eager calls reach the launcher alone, observers see the custom op, and both forms give the same bits."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trinity_kernels.custom_op import CustomOp, custom_op

seen: list[Tensor | None] = []
"""What the last backward function was passed as the gradient of the output that is not differentiable."""


@custom_op("trinity_test::scaled")
def scaled(x: Tensor, by: float) -> tuple[Tensor, Tensor]:
    """x·by, and a large output without gradient."""
    return x * by, x.new_ones(1000)


@scaled.register_fake
def _(x: Tensor, by: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(1000)


@custom_op("trinity_test::scaled_backward")
def scaled_backward(grad: Tensor, by: float) -> Tensor:
    """The gradient of x."""
    return grad * by


@scaled_backward.register_fake
def _(grad: Tensor, by: float) -> Tensor:
    return torch.empty_like(grad)


def save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.by = inputs[1]
    ctx.mark_non_differentiable(output[1])


def differentiate(ctx: Any, grad: Tensor, unused: Tensor | None) -> tuple[Tensor, None]:
    seen[:] = [unused]
    return scaled_backward(grad, ctx.by), None


scaled.register_autograd(differentiate, setup_context=save)


@custom_op("trinity_test::add_one_into", mutates_args=("into",))
def add_one_into(x: Tensor, into: Tensor) -> Tensor:
    """x; writes x + 1 to `into` as a kernel does, without the knowledge of autograd."""
    into.data.copy_(x + 1)
    return x.clone()


add_one_into.register_fake(lambda x, into: torch.empty_like(x))


class Names(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.append(op.name())
        return op(*args, **(kwargs or {}))


@pytest.fixture
def no_custom_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of the custom ops fail."""

    def fail(*_: Any) -> None:
        raise AssertionError("the custom op was called")

    for op in (scaled, scaled_backward, add_one_into):
        monkeypatch.setattr(op, "op", fail)


def test_eager_calls_reach_the_launcher_alone(no_custom_op: None) -> None:
    x = torch.randn(5, requires_grad=True)
    y, _ = scaled(x, 3.0)
    y.sum().backward()
    assert torch.equal(y, x * 3)
    assert torch.equal(x.grad, torch.full((5,), 3.0))
    with torch.no_grad():
        assert scaled(x, 3.0)[0].grad_fn is None
    assert scaled(x.detach(), 3.0)[0].grad_fn is None


@pytest.mark.parametrize("observed", [False, True])
def test_no_zeros_for_an_output_without_gradient(observed: bool) -> None:
    x = torch.randn(5, requires_grad=True)
    with Names() if observed else torch.enable_grad():
        scaled(x, 2.0)[0].sum().backward()
    assert seen == [None]


@pytest.mark.parametrize("observed", [False, True])
def test_an_undefined_gradient_stays_undefined(observed: bool) -> None:
    """The next function of the graph returns no gradient: autograd passes None, and so does the op."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, _: Tensor) -> None:
            return None

    x = torch.randn(5, requires_grad=True)
    with Names() if observed else torch.enable_grad():
        Stop.apply(scaled(x, 2.0)[0]).sum().backward()
    assert x.grad is None


def test_a_dispatch_mode_sees_the_op_in_both_passes() -> None:
    x = torch.randn(5, requires_grad=True)
    with Names() as modes:
        scaled(x, 2.0)[0].sum().backward()
    assert {"trinity_test::scaled", "trinity_test::scaled_backward"} <= set(modes.names)


def test_tensors_without_plain_data_reach_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """A meta tensor, a fake one inside and outside its mode, and vmap: a launcher of kernels would read no memory."""
    calls: list[tuple] = []
    monkeypatch.setattr(scaled, "op", lambda *args: calls.append(args))
    with FakeTensorMode():
        fake = torch.empty(5)
        scaled(fake, 2.0)
    for x in (fake, torch.empty(5, device="meta")):
        scaled(x, 2.0)
    torch.func.vmap(lambda x: (scaled(x, 2.0), x)[1])(torch.ones(2, 5))
    assert len(calls) == 4


def test_compiled_code_holds_the_op_and_gives_the_same_bits() -> None:
    nodes: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list) -> Any:
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(lambda x: scaled(x, 3.0)[0], backend=backend, fullgraph=True)
    x = torch.randn(5, requires_grad=True)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (eager,) = torch.autograd.grad(scaled(x, 3.0)[0].square().sum(), x)
    assert torch.equal(got, eager)
    assert any("trinity_test.scaled" in node for node in nodes)


@pytest.mark.parametrize("observed", [False, True])
def test_a_tensor_written_to_gets_a_new_version(observed: bool) -> None:
    """So that autograd notices a saved tensor that changed."""
    into = torch.zeros(5)
    with Names() if observed else torch.no_grad():
        add_one_into(torch.ones(5), into)
    assert into._version > 0
    assert torch.equal(into, torch.full((5,), 2.0))


@pytest.mark.parametrize("op", [scaled_backward, add_one_into], ids=["plain", "mutating"])
def test_an_op_without_backward_function_refuses_a_gradient(op: CustomOp) -> None:
    x = torch.randn(5, requires_grad=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        op(x, 2.0 if op is scaled_backward else torch.zeros(5)).sum().backward()


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(5, requires_grad=True)
    (grad,) = torch.autograd.grad(scaled(x, 2.0)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_opcheck() -> None:
    """Schema, fake tensors, autograd registration and tracing, by torch's own checker."""
    torch.library.opcheck(scaled.op, (torch.randn(5, requires_grad=True), 2.0))
