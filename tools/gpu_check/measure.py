"""Parts that measure: the card's ceilings, a training step, grouped-query attention, and the suites of bench.py."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from benchmarks.attention import Case, cases
from benchmarks.timing import Marks, device, one_line, parts_of, record, take_turns
from torch import Tensor

from trinity.config.load import load_config
from trinity.io.json_files import write_json
from trinity.io.local import write_atomically

SMALL = "configs/smoke.yaml"
"""The model of the training step on a CPU."""


def ceilings() -> None:
    """The machine; then a product and a copy as large as the card likes them, and the host's time for a launch."""
    record("machine", machine())
    on_gpu = torch.cuda.is_available()
    where, dtype = device(), torch.bfloat16 if on_gpu else torch.float32
    n, numbers = (8192, 2**31) if on_gpu else (512, 2**22)
    factors = [torch.randn(n, n, device=where, dtype=dtype) for _ in range(2)]
    product = torch.empty_like(factors[0])
    seconds = _median(lambda: torch.mm(*factors, out=product))
    record(f"product, {n}³, {dtype}", {"seconds": seconds, "tf": 2 * n**3 / seconds / 1e12})
    source = torch.ones(numbers, device=where, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    seconds = _median(lambda: target.copy_(source))
    record(f"copy of {source.nbytes / 2**30:.3g} GiB", {"seconds": seconds, "tbs": 2 * source.nbytes / seconds / 1e12})
    one, launches = torch.zeros(1, device=where), 2000
    for _ in range(2):  # the first warms up
        _synchronize()
        began = time.perf_counter()
        for _ in range(launches):
            one.add_(1)
        host = time.perf_counter() - began
        _synchronize()
    record("launch of a small kernel, host", {"seconds": host / launches})


def machine() -> dict[str, Any]:
    """What every other figure was measured on."""
    names = ("torch", "triton", "transformers", "liger_kernel")
    found: dict[str, Any] = {"python": platform.python_version()} | {name: _version(name) for name in names}
    if not torch.cuda.is_available():
        return found | {"gpu": None, "cores": os.cpu_count()}
    card = torch.cuda.get_device_properties(0)
    found |= {"gpu": card.name, "memory_gb": card.total_memory / 1e9, "multiprocessors": card.multi_processor_count}
    found |= {"cuda": torch.version.cuda, "cores": os.cpu_count()}
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm,clocks.max.mem", "--format=csv"]
    with suppress(OSError, subprocess.TimeoutExpired):  # not there, or it hangs: the figures are worth more
        done = subprocess.run(query, capture_output=True, text=True, timeout=5, stdin=subprocess.DEVNULL)
        found["nvidia_smi"] = done.stdout.strip().splitlines()
    return found


def step(variant: str, quick: bool = False) -> int:
    """Forward + backward and whole steps of a variant of benchmarks.nano_step; one row for each figure.

    Returns:
        0 also if the variant does not fit the memory, which is a row.
    """
    from benchmarks import nano_step

    routing, words = nano_step.VARIANTS[variant]
    if torch.cuda.is_available():
        title, layers = nano_step.layers_that_fit()
        config, tokens, words = nano_step.CONFIG, list(nano_step.TOKENS), [*words, *layers]
    else:
        title, layers, config, tokens = "smoke", [], SMALL, [2048]
    record(f"{title}: settings", {"config": config, "words": words, "variant": variant})
    if words != layers and load_config(config, words) == load_config(config, layers):
        record(f"{title}: the rest", {"skipped": "the config has these settings"})
        return 0

    def report(row: dict[str, Any]) -> None:
        speed = {"tokens_per_second": row["tokens"] / row["seconds"]}
        record(f"{title}: {row['what']}, {row['tokens']} tokens", row | speed)

    try:
        nano_step.measure(config, routing, tokens, words, report, repeats=1 if quick else 3)
    except torch.OutOfMemoryError as error:
        record(f"{title}: the rest", {"failed": one_line(error)})
    return 0


def suite(suite: str, **options: Any) -> None:
    """Run a suite of bench.py with its options; cases are recorded by the suite, its table and JSON come at its end."""
    module = import_module(f"benchmarks.{suite}")
    results = module.run(**options)
    folder, part = Path(os.environ["CHECK_LOGS"]), os.environ["BENCH_PART"]
    write_json(folder / f"{part}.json", results)
    text = module.table(results)
    print(text)
    write_atomically(folder / f"{part}.table.md", text + "\n")


def grouped_queries() -> None:
    """torch's varlen_attn with the model's few key/value heads, and with each repeated for its query heads.

    torch 2.11 has no argument enable_gqa; whether its kernel takes fewer key/value heads all the same is a result.
    """
    where, dtype = device(), torch.bfloat16 if torch.cuda.is_available() else torch.float32
    for name, case in cases().items():
        if case.documents or case.S > 4096:
            continue
        heads = (case.H, case.G, case.G, case.H)
        *qkv, grad = (torch.randn(case.B * case.S, n, case.C, device=where, dtype=dtype) for n in heads)
        leaves = [x.requires_grad_() for x in qkv]
        few, repeated = (_attention(leaves, case, repeat) for repeat in (1, case.H // case.G))
        calls = {
            "keys as they are": _with_backward(few, leaves, grad),
            "keys repeated": _with_backward(repeated, leaves, grad),
        }
        figures = take_turns(calls, 5, lambda kind, row, name=name: record(f"{name}: {kind}", row))
        if not any("failed" in row for row in figures.values()):
            expected = repeated().float()
            error = (few().float() - expected).norm() / expected.norm()
            record(f"{name}: relative difference", {"difference": error.item()})


def _attention(leaves: list[Tensor], case: Case, repeat: int) -> Callable[[], Tensor]:
    """Forward of causal attention over rows of S tokens; keys and values repeated `repeat` times first."""
    starts = torch.arange(0, case.B * case.S + 1, case.S, device=leaves[0].device, dtype=torch.int32)
    window = (-1 if case.window is None else case.window - 1, 0)

    def forward() -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = leaves
        options: dict[str, Any] = {"window_size": window}
        if repeat > 1:
            k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        elif "enable_gqa" in signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        return varlen_attn(q, k, v, starts, starts, case.S, case.S, **options)

    return forward


def _with_backward(forward: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> Callable[[Marks], None]:
    def call(mark: Marks) -> None:
        mixed = forward()
        mark()
        torch.autograd.grad(mixed, leaves, grad)

    return call


def _median(call: Callable[[], object], rounds: int = 15) -> float:
    """Median seconds of a call, after three that warm up."""
    seconds = [parts_of(lambda mark: call())[0] for _ in range(rounds + 3)]
    return statistics.median(seconds[3:])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ImportError:
        return None
