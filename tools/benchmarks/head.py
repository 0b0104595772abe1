"""The LM head and its loss, forward and backward: trinity_kernels ("ours"), Liger's fused loss and plain torch.

On a GPU the widths of Nano, Mini and Large with Trinity's vocabulary and 32768 tokens in bf16; on a CPU the head of
configs/smoke.yaml in fp32, without Liger, whose kernels need a GPU. trinity_kernels and Liger compute the z-loss, plain
torch does not, so it has less to do. Plain torch in chunks runs backward after each chunk, so it also holds the logits
of one chunk only.

Effective TFLOP/s count 6·T·D·V, whatever else a contender computes. Memory is the peak above the memory before the
call, both gradients included. On a GPU a figure is the median of triton.testing.do_bench, with each contender warmed
up; on a CPU the median over rounds in which the contenders take turns. The losses are printed to show that all compute
the same.

Shapes: T tokens, D width, V vocabulary.
"""

import statistics
import sys
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.timing import one_line, out_of_time, record
from torch import Tensor
from tqdm import tqdm

import trinity_kernels
from trinity.config.model import ZOO

Z = 1e-6
PEAK = 789
"""TFLOP/s that cuBLAS reaches on an H200 with dense bf16 matrices of random numbers."""
TOKENS = {"cpu": 2048, "cuda": 32768}
TORCH_CHUNK = {"cpu": 512, "cuda": 4096}
"""Tokens per chunk of plain torch, which holds their logits in bf16 and fp32, with gradients."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_TD, weight_VD, targets_T) → the loss; writes the gradients of x and weight."""


def run(quick: bool, *, names: Collection[str] | None = None, rep: int | None = None) -> dict[str, Any]:
    """Measure every contender at every width; returns the figures and what they were measured on.

    Args:
        names: of the contenders to measure; all by default.
        rep: milliseconds in which a GPU repeats a contender; 1600 by default, 400 if quick.
    """
    from benchmarks.step import machine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = ("smoke",) if device == "cpu" else ("nano",) if quick else ("nano", "mini", "large")
    results = {}
    for name in tqdm(models, unit="width", file=sys.stderr, disable=None):
        inputs = _inputs(ZOO[name].vocab_size, ZOO[name].width, device)
        flops = 6 * TOKENS[device] * ZOO[name].vocab_size * ZOO[name].width
        contenders = {k: loss for k, loss in _contenders(device).items() if names is None or k in names}
        figures: dict[str, dict[str, Any]] = {}
        rounds = _on_cpu(contenders, inputs, 2 if quick else 8) if device == "cpu" else None
        for contender, loss in contenders.items():
            figure = rounds[contender] if rounds else _on_gpu(loss, inputs, rep or (400 if quick else 1600))
            if "seconds" in figure:
                figure["tflops"] = flops / figure["seconds"] / 1e12
            figures[contender] = figure
            record(f"{name}: {contender}", figure)
        results[name] = {"shape": [TOKENS[device], ZOO[name].width, ZOO[name].vocab_size], "contenders": figures}
    return {"on": machine(), "dtype": str(inputs[0].dtype).removeprefix("torch."), "models": results}


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown tables, one per width, with ratios to trinity_kernels."""
    lines = [f"{results['on']}; {results['dtype']}"]
    for name, entry in results["models"].items():
        T, D, V = entry["shape"]
        lines += [
            "",
            f"{name}: T = {T}, D = {D}, V = {V}",
            "",
            f"| | forward + backward, ms | against ours | TFLOP/s | of {PEAK} | peak memory, GiB | loss a token |",
            "|---|---|---|---|---|---|---|",
        ]
        baseline = entry["contenders"].get("ours", {}).get("seconds")
        for contender, figure in entry["contenders"].items():
            if "failed" in figure:
                lines.append(f"| {contender} | {figure['failed']} | | | | | |")
                continue
            on_gpu = "memory_gib" in figure
            memory = f"{figure['memory_gib']:.2f}" if on_gpu else ""
            share = f"{figure['tflops'] / PEAK:.1%}" if on_gpu else ""
            against = f"{figure['seconds'] / baseline:.2f}" if baseline else ""
            lines.append(
                f"| {contender} | {figure['seconds'] * 1e3:.1f} | {against} "
                f"| {figure['tflops']:.3g} | {share} | {memory} | {figure['loss'] / T:.4f} |"
            )
    return "\n".join(lines)


def _inputs(vocabulary: int, width: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """As at the start of a run: x like the output of a norm, the weight's σ 0.5/√d; so logits of about 0.5."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    random = torch.Generator(device).manual_seed(0)
    x_TD = torch.randn(TOKENS[device], width, generator=random, device=device)
    weight_VD = torch.randn(vocabulary, width, generator=random, device=device).mul_(0.5 / width**0.5)
    targets_T = torch.randint(vocabulary, (TOKENS[device],), generator=random, device=device)
    return x_TD.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), targets_T


def _contenders(device: str) -> dict[str, Loss]:
    contenders = {"ours": _trinity("auto")}
    if device == "cuda":
        contenders["ours, reference"] = _trinity("reference")
        try:
            contenders["Liger"] = _liger()
        except ImportError:
            print("liger_kernel is not installed: without Liger", file=sys.stderr)
    chunk = TORCH_CHUNK[device]
    contenders[f"torch, chunks of {chunk}"] = lambda *inputs: _torch(*inputs, chunk)
    contenders["torch, all logits"] = lambda *inputs: _torch(*inputs, TOKENS[device])
    return contenders


def _trinity(kernel: str) -> Loss:
    def loss(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        total = trinity_kernels.linear_cross_entropy(x_TD, weight_VD, targets_T, Z, kernel=kernel)[0]
        total.backward()
        return total

    return loss


def _liger() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum", lse_square_scale=Z, accum_dtype=torch.float32)

    def loss(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        total = fused(weight_VD, x_TD, targets_T)
        total.backward()
        return total

    return loss


def _torch(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int) -> Tensor:
    total = torch.zeros((), device=x_TD.device)
    for x_CD, targets_C in zip(x_TD.split(chunk), targets_T.split(chunk)):
        loss = F.cross_entropy((x_CD @ weight_VD.t()).float(), targets_C, reduction="sum")
        loss.backward()
        total += loss.detach()
    return total


def _step(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    for tensor in inputs[:2]:
        tensor.grad = None
    return loss(*inputs)


def _on_gpu(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor], rep: int) -> dict[str, Any]:
    from triton.testing import do_bench

    for tensor in inputs[:2]:
        tensor.grad = None
    if out_of_time():
        return {"failed": "not measured: the suite's time was up"}
    try:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        value = _step(loss, inputs).item()
        memory = torch.cuda.max_memory_allocated() - before
        seconds = do_bench(lambda: _step(loss, inputs), rep=rep, return_mode="median") / 1e3
    except Exception as error:  # any error of a contender is its result
        return {"failed": one_line(error)}
    return {"seconds": seconds, "memory_gib": memory / 2**30, "loss": value}


def _on_cpu(contenders: dict[str, Loss], inputs: tuple[Tensor, Tensor, Tensor], repetitions: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    losses = {}
    for _ in range(repetitions + 1):
        for name, loss in contenders.items():
            began = time.perf_counter()
            losses[name] = _step(loss, inputs).item()
            seconds[name].append(time.perf_counter() - began)
    # the first of each warms up
    return {name: {"seconds": statistics.median(seconds[name][1:]), "loss": losses[name]} for name in contenders}
