"""Every differentiable Triton op and a whole block: eager, as custom ops, and compiled give the same bits.

The three run the same launchers, so nothing may differ. Eager must not call a custom op, and compiled code must be one
graph without breaks. Backend "aot_eager" suffices for that: forward and backward are traced, and no code is generated.

Shapes: T tokens, D width, E experts, F expert width, K active experts, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import trinity_kernels
from tests.kernels.test_model_triton import CONFIG, kernels
from tests.kernels.triton_case import DEVICE
from trinity.models.attention import rope_cos_sin
from trinity.models.attention_backends import AttentionMask
from trinity.models.trinity import Block, Trinity
from trinity.parallel.activation_checkpoint import recompute_blocks
from trinity_kernels import experts_triton, routing_triton
from trinity_kernels.custom_op import CustomOp

FOLDER = Path(trinity_kernels.__file__).parent
T, D, E, F, K, V = 12, 32, 6, 16, 2, 40


class TrinityOps(TorchDispatchMode):
    """Makes operations observed, and collects the names of this project's."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if op.namespace == "trinity":
            self.names.add(op.name().removeprefix("trinity::"))
        return op(*args, **(kwargs or {}))


def normal(*shape: int, seed: int = 0) -> Tensor:
    """A leaf of normal numbers."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return x.to(DEVICE).requires_grad_()


def choices() -> Tensor:
    """[T, K] distinct experts of every token."""
    return torch.rand(T, E, generator=torch.Generator().manual_seed(0)).argsort(dim=1)[:, :K].to(DEVICE)


ROTATION = rope_cos_sin(torch.arange(T, device=DEVICE).unsqueeze(0), 8, 100.0, torch.float32)
INDICES_TK, TARGETS_T = choices(), torch.arange(T, device=DEVICE) % V
OPS: dict[str, tuple[Callable[..., Any], list[Tensor], int]] = {
    # name: (function of the leaves, leaves, number of custom ops in both passes)
    "rms_norm": (lambda x, g: trinity_kernels.rms_norm(x, g, 1e-5, kernel="triton"), [normal(T, D), normal(D)], 2),
    "norm_add": (
        lambda y, x, g: trinity_kernels.norm_add(y, x, g, 1e-5, kernel="triton"),
        [normal(T, D), normal(T, D, seed=1), normal(D)], 2,
    ),
    "add_norm": (
        lambda y, x, p, g: trinity_kernels.add_norm(y, x, p, g, 1e-5, kernel="triton"),
        [normal(T, D), normal(T, D, seed=1), normal(D), normal(D, seed=1)], 2,
    ),
    "qk_norm": (
        lambda x, g: trinity_kernels.qk_norm(x, g, 1e-5, ROTATION, kernel="triton"), [normal(1, T, 2, 8), normal(8)], 2
    ),
    "sigmoid_gate": (
        lambda x, gate: trinity_kernels.sigmoid_gate(x, gate, kernel="triton"), [normal(T, D), normal(T, D, seed=1)], 2
    ),
    "swiglu": (lambda x: trinity_kernels.swiglu(x, kernel="triton"), [normal(T, 2 * D)], 2),
    "weigh": (
        lambda x: trinity_kernels.weigh(x.sigmoid(), INDICES_TK, 2.0, 1, True, kernel="triton"), [normal(T, E)], 2
    ),
    "router_scores": (
        lambda x, w: trinity_kernels.router_scores(x.bfloat16(), w, kernel="triton"), [normal(T, D), normal(E, D)], 2
    ),
    "expert_mlp": (
        lambda x, w1, w2, s: trinity_kernels.expert_mlp(x, w1, w2, INDICES_TK, s, None, True, kernel="triton"),
        [normal(T, D), normal(E, 2, F, D), normal(E, D, F), normal(T, K)], 2,
    ),
    "linear_cross_entropy": (
        lambda x, w: trinity_kernels.linear_cross_entropy(x, w, TARGETS_T, 1e-3, kernel="triton")[0],
        [normal(T, D), normal(V, D)], 1,
    ),
}  # fmt: skip


def run(function: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
    """The outputs and the gradients of all leaves."""
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if isinstance(x, Tensor)]
    graded = [x for x in outputs if x.requires_grad]
    weights = [torch.linspace(-1, 1, x.numel(), device=x.device, dtype=x.dtype).view_as(x) for x in graded]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(graded, leaves, weights)]


def assert_three_forms_agree(function: Callable[..., Any], leaves: list[Tensor]) -> set[str]:
    """Eager, observed and compiled give the same bits; returns the names of the custom ops that ran observed."""
    torch._dynamo.reset()
    counters.clear()
    eager = run(function, leaves)
    with TrinityOps() as ops:
        observed = run(function, leaves)
    compiled = run(torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False), leaves)
    assert counters["stats"]["unique_graphs"] == 1
    assert len(eager) == len(observed) == len(compiled)
    for number, (a, b, c) in enumerate(zip(eager, observed, compiled)):
        assert torch.equal(a, b), number
        assert torch.equal(a, c), number
    return ops.names


@pytest.mark.parametrize("name", OPS)
def test_eager_custom_op_and_compiled_give_the_same_bits(name: str) -> None:
    function, leaves, ops = OPS[name]
    assert len(assert_three_forms_agree(function, leaves)) == ops


@pytest.mark.parametrize("name", OPS)
def test_eager_calls_no_custom_op(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's implementation of a custom op is what makes it slow; it is replaced by a failure."""
    modules = [import_module(f"trinity_kernels.{path.stem}") for path in FOLDER.glob("*_triton.py")]
    custom_ops = [x for module in modules for x in vars(module).values() if isinstance(x, CustomOp)]
    assert len(custom_ops) >= 17  # nine differentiable ones, eight of their backward functions

    def fail(*_: Any) -> None:
        raise AssertionError("a custom op was called")

    for op in custom_ops:
        monkeypatch.setattr(op, "op", fail)
    function, leaves, _ = OPS[name]
    run(function, leaves)


def test_unused_results_of_add_norm() -> None:
    """One of the two outputs is enough; its gradients are those with zeros for the other."""
    function, leaves, _ = OPS["add_norm"]
    for used in range(2):
        grads = torch.autograd.grad(function(*leaves)[used].sum(), leaves)
        with_zeros = torch.autograd.grad(
            sum(x.sum() if place == used else 0.0 * x.sum() for place, x in enumerate(function(*leaves))), leaves
        )
        assert all(torch.equal(a, b) for a, b in zip(grads, with_zeros))


def block_in_triton(layer: int) -> tuple[Block, Callable[..., Any], list[Tensor]]:
    """A block, its outputs as a function of the input and the parameters, and these."""
    torch.manual_seed(0)
    block = Block(CONFIG, layer, kernels("triton"))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for buffer in block.buffers():
        buffer.zero_()
    block.to(DEVICE)
    positions = torch.arange(T, device=DEVICE).unsqueeze(0)
    rotation = rope_cos_sin(positions, CONFIG.head_dim, CONFIG.rope_theta, torch.float32)

    def function(x_BSD: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        y_BSD, routing = block(x_BSD, rotation, AttentionMask(positions, None, True, "sdpa"))
        return (y_BSD, *(routing or ()))

    return block, function, [normal(1, T, CONFIG.width), *block.parameters()]


@pytest.mark.parametrize("layer", [0, 1, 3], ids=["dense, local", "sparse, local", "sparse, global"])
def test_a_block_compiles_into_one_graph(layer: int) -> None:
    """The whole block in Triton: fullgraph, so no graph break, and one graph; the same bits as eager."""
    block, function, leaves = block_in_triton(layer)
    names = assert_three_forms_agree(function, leaves)
    assert {"norm_triton", "add_norm_triton_backward", "qk_norm_triton", "swiglu_triton_backward"} <= names
    assert ("expert_mlp_triton" in names) == ("route_triton" in names) == block.sparse


@pytest.mark.parametrize(("kind", "will_compile"), [("block", False), ("block", True), ("selective", False)])
def test_recompute_of_a_block_in_triton(
    monkeypatch: pytest.MonkeyPatch, kind: Literal["block", "selective"], will_compile: bool
) -> None:
    """The same bits as without recompute; the experts run a second time unless their op is saved."""
    block, function, leaves = block_in_triton(1)
    plain = run(function, leaves)
    ran: Counter[str] = Counter()
    for module, name in ((routing_triton, "launch_route"), (experts_triton, "forward")):
        launcher = getattr(module, name)

        def counted(*args: Any, name: str = name, launcher: Callable[..., Any] = launcher) -> Any:
            ran[name] += 1
            return launcher(*args)

        monkeypatch.setattr(module, name, counted)
    recompute_blocks(cast(Trinity, SimpleNamespace(blocks=[block])), kind, will_compile)
    recomputed = run(function, leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed))
    assert ran == {"launch_route": 1, "forward": 1 if kind == "selective" else 2}
