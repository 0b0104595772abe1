"""Routing and the grouping of rows: Triton against the torch reference, at the sizes of the zoo's models.

The scores from x in bf16, the choice of experts with the counts, the gates with the entropy (and the sequence-wise
loss), the gradients, the grouping of rows by expert, and one table of tiles of 128 rows. Routing is balanced, or skewed
by a bias that falls from +½ to −½ over the experts.
On a GPU 32,768 tokens, timed by Triton's do_bench: the median, with the L2 cache cleared before each run. On a CPU the
reference alone, at a small size, because timing Triton's interpreter would mean nothing.

GB/s count the least an op must read and write, each tensor once: scratch memory costs time and adds no bytes.

Shapes: T tokens, D width, E experts, K active experts, R routed rows.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.timing import one_line, out_of_time, record
from torch import Tensor
from tqdm import tqdm

import trinity_kernels
from trinity.config.model import ZOO
from trinity_kernels.grouping import table_length

MODELS = {"cpu": ("smoke",), "cuda": ("nano", "mini", "large")}
TOKENS = {"cpu": 1024, "cuda": 32768}
KERNELS = {"cpu": ("reference",), "cuda": ("triton", "reference")}
BLOCK = 128
"""Routed rows of a tile."""
ROWS = 8
"""Sequences that the tokens consist of."""
SKEWS = {"balanced": 0.0, "skewed": 0.5}


def run(quick: bool) -> dict[str, Any]:
    """Measure every op; returns the figures and what they were measured on."""
    from benchmarks.step import machine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for model in tqdm(MODELS[device], unit="model", file=sys.stderr, disable=None):
        for skew, most in SKEWS.items():
            for op, bytes_, calls in _ops(model, most, device):
                row = {"model": model, "routing": skew, "op": op, "bytes": bytes_, "seconds": {}, "failed": {}}
                for kernel, call in calls.items():
                    try:
                        if out_of_time():
                            raise TimeoutError("the suite's time was up")
                        row["seconds"][kernel] = _seconds(call, device, quick)
                    except Exception as error:  # any error of a kernel is its result
                        row["failed"][kernel] = one_line(error)
                rows.append(row)
                for kernel in calls:
                    figures = {"seconds": row["seconds"].get(kernel), "bytes": bytes_}
                    record(f"{model}, {skew}, {op}: {kernel}", figures | _reason(row["failed"].get(kernel)))
    return {"on": machine(), "tokens": TOKENS[device], "kernels": KERNELS[device], "found": rows}


def table(results: dict[str, Any]) -> str:
    """The figures as a Markdown table; with two kernels, also the ratio of their times."""
    kernels = results["kernels"]
    heads = [f"{kernel}, {unit}" for kernel in kernels for unit in ("µs", "GB/s")]
    heads += [f"{kernel} against {kernels[0]}" for kernel in kernels[1:]]
    lines = [
        f"{results['on']}; {results['tokens']} tokens",
        "",
        "| model, routing, op | " + " | ".join(heads) + " |",
        "|---" * (1 + len(heads)) + "|",
    ]
    for row in results["found"]:
        seconds = row["seconds"]
        cells = [
            f"{seconds[k] * 1e6:.1f} | {row['bytes'] / seconds[k] / 1e9:.3g}"
            if k in seconds
            else f"{row['failed'][k]} | "
            for k in kernels
        ]
        both = [k for k in kernels[1:] if k in seconds and kernels[0] in seconds]
        cells += [f"{seconds[k] / seconds[kernels[0]]:.2f}" if k in both else "" for k in kernels[1:]]
        lines.append(f"| {row['model']}, {row['routing']}, {row['op']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _reason(failed: str | None) -> dict[str, str]:
    return {} if failed is None else {"failed": failed}


def _ops(model: str, most: float, device: str) -> Iterator[tuple[str, int, dict[str, Callable[[], Any]]]]:
    """Each op's name, the bytes it must read and write, and one call per kernel."""
    config, T = ZOO[model], TOKENS[device]
    D, E, K = config.width, config.experts, config.active_experts
    R = T * K
    random = torch.Generator(device).manual_seed(0)
    scores_TE = torch.rand(T, E, generator=random, device=device).requires_grad_()
    bias_E = torch.linspace(most, -most, E, device=device)
    indices_TK, _ = trinity_kernels.route.reference(scores_TE.detach(), bias_E, K)
    ends_E = trinity_kernels.group_rows.reference(indices_TK, E, R).ends_E

    def each(op: Any, *arguments: Any) -> dict[str, Callable[[], Any]]:
        return {kernel: lambda kernel=kernel: op(*arguments, kernel=kernel) for kernel in KERNELS[device]}

    x_TD = torch.randn(T, D, generator=random, device=device).bfloat16().requires_grad_()
    weight_ED = (torch.randn(E, D, generator=random, device=device) / D**0.5).requires_grad_()
    product = each(trinity_kernels.router_scores, x_TD, weight_ED)
    yield "router_scores", 2 * T * D + 4 * E * D + 4 * T * E, product
    backward = {kernel: _backward([call()], [x_TD, weight_ED]) for kernel, call in product.items()}
    yield "router_scores, backward", 2 * 4 * T * E + 2 * 2 * T * D + 2 * 4 * E * D, backward
    yield "route", 4 * T * E + 4 * E + 8 * R + 8 * E, each(trinity_kernels.route, scores_TE.detach(), bias_E, K)
    for name, loss in (("weigh", False), ("weigh with sequence loss", True)):
        weigh = each(trinity_kernels.weigh, scores_TE, indices_TK, config.route_scale, ROWS, loss)
        yield name, 4 * T * E + 8 * R + 4 * R, weigh
        outputs = {kernel: [value for value in call() if value is not None][:-1] for kernel, call in weigh.items()}
        backward = {kernel: _backward(values, [scores_TE]) for kernel, values in outputs.items()}
        read = 4 * T * E if loss else 4 * R
        yield f"{name}, backward", read + 8 * R + 4 * R + 4 * T * E, backward
    yield "group_rows", 8 * R + 4 * R + 4 * R + 4 * E, each(trinity_kernels.group_rows, indices_TK, E, R)
    yield "tile_table", 4 * E + 12 * table_length(R, BLOCK, E), each(trinity_kernels.tile_table, ends_E, R, BLOCK)


def _backward(outputs: list[Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
    gradients = [torch.rand_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)


def _seconds(call: Callable[[], Any], device: str, quick: bool) -> float:
    """The median of several runs."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(call, rep=20 if quick else 100, return_mode="median") / 1e3
    call()
    took = []
    for _ in range(3 if quick else 20):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return statistics.median(took)
