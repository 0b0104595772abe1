"""Memory-bound ops (norms, QK-norm with RoPE, gate, SwiGLU) against torch, torch.compile and Liger's norm.

Each op forward and backward. On a GPU, at the widths of Nano, Mini and Large with 32,768 tokens in bf16: Triton
("ours"), the same equation in torch's own operations, that compiled, and for rms_norm Liger's if its package is
installed. On a CPU at a small size in fp32: trinity_kernels' reference against torch's own operations; timing Triton's
interpreter would mean nothing.

On a GPU a figure is the median of Triton's do_bench, which clears the L2 cache before each run; on a CPU the median
over turns. GB/s count the least an op must read and write, each tensor once, in the tensors' dtype, without gains and
angles; on a GPU they are compared with the 4.3 TB/s of a copy on an H200.

Shapes: B rows, S sequence, T = B·S tokens, D width, C head width.
"""

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from benchmarks.step import machine
from benchmarks.timing import COPY_TBS, Marks, device, one_line, out_of_time, record, take_turns
from torch import Tensor
from tqdm import tqdm

import trinity_kernels
from trinity.config.model import ZOO, ModelConfig
from trinity.models.attention import rope_cos_sin

MODELS = {"cpu": ("smoke",), "cuda": ("nano", "mini", "large")}
ROWS = {"cpu": (8, 256), "cuda": (8, 4096)}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
EPS = 1e-5

Outputs = tuple[Tensor, ...]


class Case(NamedTuple):
    """One op at one size.

    inputs: all require gradients.
    op, plain: the op of trinity_kernels, and the same in torch's own operations.
    forward, backward: how many numbers each must read and write.
    """

    name: str
    inputs: tuple[Tensor, ...]
    op: Callable[..., Any]
    plain: Callable[..., Any]
    forward: int
    backward: int


def run(quick: bool, *, compiled: bool = True, rep: int | None = None) -> dict[str, Any]:
    """Measure every contender; returns the figures and what they were measured on.

    Args:
        compiled: whether torch.compile is a contender; it takes seconds for each op.
        rep: milliseconds in which a GPU repeats a contender; 100 by default, 20 if quick.
    """
    where = device().type
    rows = []
    for model in tqdm(MODELS[where][: 1 if quick else None], unit="model", file=sys.stderr, disable=None):
        for case in _cases(ZOO[model], where):
            size = DTYPES[where].itemsize
            rows.append({
                "model": model,
                "op": case.name,
                "bytes": [case.forward * size, case.backward * size],
                "contenders": _measure(case, where, quick, compiled, rep or (20 if quick else 100)),
            })  # fmt: skip
            for name, figures in rows[-1]["contenders"].items():
                record(f"{model}, {case.name}: {name}", figures | {"bytes": rows[-1]["bytes"]})
    return {"on": machine(), "device": where, "tokens": ROWS[where][0] * ROWS[where][1], "found": rows}


def table(results: dict[str, Any]) -> str:
    """The figures as a Markdown table, with each contender's total time relative to trinity_kernels."""
    lines = [
        f"{results['on']}; {results['tokens']} tokens",
        "",
        f"| model, op | | forward, µs | GB/s | % of {COPY_TBS} TB/s | backward, µs | GB/s | % | time against ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["found"]:
        baseline = row["contenders"].get("ours", {})
        for name, figures in row["contenders"].items():
            head = f"| {row['model']}, {row['op']} | {name} | "
            if "failed" in figures:
                lines.append(f"{head}does not run: {figures['failed']} | | | | | | |")
                continue
            cells = []
            for seconds, bytes_ in zip(figures["seconds"], row["bytes"]):
                speed = bytes_ / seconds
                share = f"{speed / COPY_TBS / 1e10:.0f}" if results["device"] == "cuda" else "–"
                cells.append(f"{seconds * 1e6:.1f} | {speed / 1e9:.3g} | {share}")
            against = f"{sum(figures['seconds']) / sum(baseline['seconds']):.2f}" if "seconds" in baseline else "–"
            lines.append(head + " | ".join([*cells, against]) + " |")
    return "\n".join(lines)


def _measure(case: Case, where: str, quick: bool, compiled: bool, rep: int) -> dict[str, dict[str, Any]]:
    contenders = {"ours": case.op, "torch": case.plain}
    if where == "cpu":
        turns = {name: _in_parts(function, case.inputs) for name, function in contenders.items()}
        return take_turns(turns, 5 if quick else 40)
    if compiled:
        contenders["torch.compile"] = torch.compile(case.plain, dynamic=False)
    if case.name == "rms_norm" and find_spec("liger_kernel"):
        contenders["Liger"] = _liger_norm
    results: dict[str, dict[str, Any]] = {}
    for name, function in contenders.items():
        try:
            if out_of_time():
                raise TimeoutError("the suite's time was up")
            results[name] = {"seconds": _on_gpu(function, case.inputs, rep)}
        except Exception as error:  # any error of a contender is its result
            results[name] = {"failed": one_line(error)}
    if compiled:
        torch._dynamo.reset()  # one more compiled function per case would exceed the limit of recompilations
    return results


def _in_parts(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Callable[[Marks], None]:
    """Forward, a mark, backward."""
    dys = [torch.randn_like(y) for y in _outputs(function, inputs)]

    def call(mark: Marks) -> None:
        out = _outputs(function, inputs)
        mark()
        torch.autograd.grad(out, inputs, dys)

    return call


def _on_gpu(function: Callable[..., Any], inputs: tuple[Tensor, ...], rep: int) -> list[float]:
    """Median seconds of forward and of backward."""
    from triton.testing import do_bench

    out = _outputs(function, inputs)
    dys = [torch.randn_like(y) for y in out]
    calls = (lambda: function(*inputs), lambda: torch.autograd.grad(out, inputs, dys, retain_graph=True))
    return [do_bench(call, rep=rep, return_mode="median") / 1e3 for call in calls]


def _outputs(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Outputs:
    out = function(*inputs)
    return out if isinstance(out, tuple) else (out,)


def _cases(config: ModelConfig, where: str) -> Iterator[Case]:
    """Every op on random numbers; queries, keys and gate are parts of one projection, as in the model."""
    (B, S), D, C = ROWS[where], config.width, config.head_dim
    T, q_width, kv_width = B * S, config.heads * C, config.kv_heads * C
    random = torch.Generator(where).manual_seed(0)

    def tensor(*shape: int, dtype: torch.dtype = DTYPES[where]) -> Tensor:
        return torch.randn(shape, generator=random, device=where).to(dtype).requires_grad_()

    def gain(width: int) -> Tensor:
        return tensor(width, dtype=torch.float32)

    rms_norm, norm_add, add_norm = trinity_kernels.rms_norm, trinity_kernels.norm_add, trinity_kernels.add_norm
    y, x = tensor(T, D), tensor(T, D)
    yield Case("rms_norm", (x, gain(D)), lambda x, g: rms_norm(x, g, EPS), _norm, 2 * T * D, 3 * T * D)
    yield Case("norm_add", (y, x, gain(D)), lambda *given: norm_add(*given, EPS), _norm_add, 3 * T * D, 3 * T * D)
    both = (y, x, gain(D), gain(D))
    yield Case("add_norm", both, lambda *given: add_norm(*given, EPS), _add_norm, 4 * T * D, 6 * T * D)

    rows = (q_width, kv_width, kv_width, q_width)
    rotation = rope_cos_sin(torch.arange(S, device=where).unsqueeze(0), C, config.rope_theta, torch.float32)
    projected = tensor(B, S, sum(rows)).detach()
    q, k, _, gate = (part.requires_grad_() for part in projected.split(rows, dim=-1))
    q, k = (part.detach().unflatten(-1, (-1, C)).requires_grad_() for part in (q, k))
    numbers = T * (q_width + kv_width)
    for name, turn in (("QK-norm and RoPE", rotation), ("QK-norm", None)):
        yield Case(name, (q, k, gain(C), gain(C)), _trinity_qk(turn), _plain_qk(turn), 2 * numbers, 3 * numbers)
    mixed, numbers = tensor(B, S, q_width), T * q_width
    yield Case("gate", (mixed, gate), trinity_kernels.sigmoid_gate, _gate, 3 * numbers, 5 * numbers)
    numbers = T * config.dense_width
    pre = tensor(T, 2 * config.dense_width)
    yield Case("SwiGLU, dense", (pre,), trinity_kernels.swiglu, _swiglu, 3 * numbers, 5 * numbers)


def _trinity_qk(turn: tuple[Tensor, Tensor] | None) -> Callable[..., Outputs]:
    def both(q: Tensor, k: Tensor, q_gain: Tensor, k_gain: Tensor) -> Outputs:
        qk_norm = trinity_kernels.qk_norm
        return qk_norm(q, q_gain, EPS, turn), qk_norm(k, k_gain, EPS, turn)

    return both


def _plain_qk(turn: tuple[Tensor, Tensor] | None) -> Callable[..., Outputs]:
    def both(q: Tensor, k: Tensor, q_gain: Tensor, k_gain: Tensor) -> Outputs:
        q, k = _norm(q, q_gain), _norm(k, k_gain)
        return (q, k) if turn is None else (_rotate(q, *turn), _rotate(k, *turn))

    return both


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + EPS) * gain).to(x.dtype)


def _norm_add(y: Tensor, x: Tensor, gain: Tensor) -> Tensor:
    return x + _norm(y, gain)


def _add_norm(y: Tensor, x: Tensor, post_gain: Tensor, gain: Tensor) -> Outputs:
    r = x + _norm(y, post_gain)
    return r, _norm(r, gain)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _gate(x: Tensor, gate: Tensor) -> Tensor:
    return x * torch.sigmoid(gate)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _liger_norm(x: Tensor, gain: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    # in fp32, rounded once, as trinity_kernels; not in place, because the incoming gradient is used again
    return liger_rms_norm(x, gain, EPS, casting_mode="gemma", in_place=False)
