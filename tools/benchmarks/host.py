"""Host time of the Triton path: µs per op and per block, without the kernels.

The time between two launches that Python and torch need. It is measured on a CPU: every Triton launch is replaced by a
function that does nothing, and the tensors are so small that torch's own operations take only their fixed time. Not
included: Triton's launcher, CUDA's allocator and driver.

Two forms of every op take turns: its launcher, as in eager mode, and the torch.library.custom_op that compilers and
dispatch modes see (trinity_kernels.custom_op). Times are CPU time of this process, medians.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import torch
from torch import Tensor

import trinity_kernels
from trinity.config.model import ModelConfig
from trinity.config.run import KernelsConfig
from trinity.models.attention import rope_cos_sin
from trinity.models.attention_backends import AttentionMask
from trinity.models.trinity import Block, Trinity
from trinity.parallel.activation_checkpoint import recompute_blocks
from trinity_kernels import custom_op, op

T, D, E, F, K, H, C = 4, 32, 4, 16, 2, 2, 8
CONFIG = ModelConfig(
    vocab_size=64, width=D, layers=4, dense_layers=1, dense_width=32, heads=H, kv_heads=1, head_dim=C, window=8,
    experts=E, active_experts=K, shared_experts=1, expert_width=F,
)  # fmt: skip
FORMS = {"launcher": custom_op.is_observed, "custom op": lambda _args: True}
"""Form → the rule that decides whether a call goes to the custom op."""
RECOMPUTE = {"none": None, "block": ("block", False), "block, by a dispatch mode": ("block", True),
             "selective": ("selective", False)}  # fmt: skip
"""Name → arguments of recompute_blocks."""
INDICES = {"route_kernel": 2, "place_kernel": 1}
"""Kernel → which argument holds indices that it writes."""


class Case(NamedTuple):
    """One op: the function of its leaves, which require gradients, and its calls in a sparse block."""

    function: Callable[..., Any]
    leaves: list[Tensor]
    calls: int = 1


def run(quick: bool) -> dict[str, Any]:
    """Measure every op and a sparse block in both forms; return the figures and the machine."""
    from benchmarks.step import machine

    rounds = 20 if quick else 400
    with _no_launches():
        ops = {name: _take_turns(partial(_two_passes, *case[:2]), rounds) for name, case in _cases().items()}
        blocks = {name: _take_turns(_block(how), rounds // 4) for name, how in RECOMPUTE.items()}
    calls = {name: case.calls for name, case in _cases().items()}
    return {"on": machine(), "ops": ops, "calls": calls, "blocks": blocks}


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    head = " | ".join(f"{form}: forward, backward" for form in FORMS)
    lines = [f"{results['on']}; host time in µs, launches replaced by nothing", ""]
    lines += [f"| op | calls a block | {head} |", "|---|---|---|---|"]
    for name, forms in results["ops"].items():
        lines.append(f"| `{name}` | {results['calls'][name]} | {_cells(forms)} |")
    sums = {
        form: [sum(results["calls"][name] * row[form][part] for name, row in results["ops"].items()) for part in (0, 1)]
        for form in FORMS
    }
    lines += [f"| all of a block | {sum(results['calls'].values())} | {_cells(sums)} |", ""]
    lines += [f"| a sparse block, recompute | {head} |", "|---|---|---|"]
    lines += [f"| {name} | {_cells(forms)} |" for name, forms in results["blocks"].items()]
    return "\n".join(lines)


def _cells(forms: dict[str, list[float]]) -> str:
    return " | ".join(f"{forms[form][0]:.0f}, {forms[form][1]:.0f}" for form in FORMS)


@contextmanager
def _no_launches() -> Iterator[None]:
    """Triton's launches do nothing, kernel="triton" is allowed on a CPU, and one thread computes."""
    with patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported
        from triton.runtime.jit import JITFunction
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with patch.object(JITFunction, "run", _instead_of_a_launch), patch.object(op, "interpreted", lambda: True):
            yield
    finally:
        torch.set_num_threads(threads)


def _instead_of_a_launch(kernel: Any, *args: Any, **_: Any) -> None:
    """Nothing, but for tensors by which torch's operations index: they hold zeros."""
    if kernel.__name__ in INDICES:
        args[INDICES[kernel.__name__]].zero_()


def _cases() -> dict[str, Case]:
    """Every Triton op of a sparse block."""
    indices_TK = torch.arange(T * K).view(T, K) % E
    bias_E, rotation = torch.zeros(E), rope_cos_sin(torch.arange(T).unsqueeze(0), C, 1e4, torch.float32)
    use, x, gain = partial(partial, kernel="triton"), _leaf(T, D), _leaf(D)
    return {
        "rms_norm": Case(use(trinity_kernels.rms_norm, eps=1e-5), [x, gain]),
        "add_norm": Case(use(trinity_kernels.add_norm, eps=1e-5), [x, _leaf(T, D), gain, _leaf(D)]),
        "norm_add": Case(use(trinity_kernels.norm_add, eps=1e-5), [x, _leaf(T, D), gain]),
        "qk_norm": Case(use(trinity_kernels.qk_norm, eps=1e-5, rotation=rotation), [_leaf(1, T, H, C), _leaf(C)], 2),
        "sigmoid_gate": Case(use(trinity_kernels.sigmoid_gate), [x, _leaf(T, D)]),
        "swiglu": Case(use(trinity_kernels.swiglu), [_leaf(T, 2 * F)]),
        "route": Case(lambda s: trinity_kernels.route(s.detach(), bias_E, K, kernel="triton"), [_leaf(T, E)]),
        "weigh": Case(lambda s: trinity_kernels.weigh(s, indices_TK, 2.0, 1, True, kernel="triton"), [_leaf(T, E)]),
        "expert_mlp": Case(
            lambda x, w1, w2, s: trinity_kernels.expert_mlp(x, w1, w2, indices_TK, s, kernel="triton"),
            [x, _leaf(E, 2, F, D), _leaf(E, D, F), _leaf(T, K)],
        ),
    }


def _leaf(*shape: int) -> Tensor:
    return torch.ones(shape, requires_grad=True)


def _block(recompute: tuple[str, bool] | None) -> Callable[[], tuple[int, int, int]]:
    """Both passes of a sparse local block with every op in Triton."""
    kernels: dict[str, Any] = {x.name: "triton" for x in fields(KernelsConfig) if "reference" in str(x.type)}
    block = Block(CONFIG, 1, KernelsConfig(**kernels))
    for tensor in (*block.parameters(), *block.buffers()):
        tensor.data.zero_()
    if recompute:
        kind, will_compile = recompute
        only_block = cast(Trinity, SimpleNamespace(blocks=[block]))  # recompute_blocks reads the blocks alone
        recompute_blocks(only_block, kind, will_compile)  # type: ignore[arg-type]
    positions = torch.arange(T).unsqueeze(0)
    rotation = rope_cos_sin(positions, C, 1e4, torch.float32)

    def function(x_BSD: Tensor, *_: Tensor) -> Tensor:
        y_BSD: Tensor = block(x_BSD, rotation, AttentionMask(positions, None, True, "sdpa"))[0]
        return y_BSD

    return partial(_two_passes, function, [_leaf(1, T, D), *block.parameters()])


def _two_passes(function: Callable[..., Any], leaves: list[Tensor]) -> tuple[int, int, int]:
    """CPU time before, between and after the two passes, in ns."""
    began = time.process_time_ns()
    outputs = function(*leaves)
    between = time.process_time_ns()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    graded = [x for x in outputs if x is not None and x.requires_grad]
    if graded:
        weights = [torch.ones_like(x) for x in graded]
        between_2 = time.process_time_ns()
        torch.autograd.grad(graded, leaves, weights)
        return began + between_2 - between, between_2, time.process_time_ns()
    return began, between, between


def _take_turns(passes: Callable[[], tuple[int, int, int]], rounds: int) -> dict[str, list[float]]:
    """Median µs of both passes of each form, after a few rounds of warm-up."""
    samples: dict[str, list[tuple[int, int]]] = {form: [] for form in FORMS}
    for number in range(rounds + 5):
        for form, rule in FORMS.items():
            with patch.object(custom_op, "is_observed", rule):
                began, between, ended = passes()
            if number >= 5:
                samples[form].append((between - began, ended - between))
    return {form: [statistics.median(part) / 1e3 for part in zip(*times)] for form, times in samples.items()}
