"""Muon's step: ours against a loop over matrices, and against torch.optim.Muon on the dense part, in one run.

The matrices are those of a model of the zoo: configs/smoke.yaml's on a CPU, four layers of Nano's on a GPU. Ours
batches all matrices of a shape; the loop is the same update written for one matrix at a time; torch.optim.Muon takes
two dimensions only and multiplies in bf16, so it has the dense part alone, and there ours is measured in bf16 as well.
Products are in fp32 on a CPU, in bf16 on a GPU. On a GPU ours is the Triton kernels, and "kernel=reference" the same
with torch's batched GEMM. A figure is the median over steps, the contenders taking turns.

TFLOP/s count every product of Newton-Schulz whole (`newton_schulz_flops`), for all contenders alike: one that computes
half of a symmetric product has more of them, not fewer flops. Momentum, decay and update are in the seconds.

On a GPU the table ends with Muon's share of a step of the whole of Nano on that one GPU. Muon's seconds there are
measured, scaled by flops from the layers at hand to all of them; the rest of the step is a prediction.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from trinity.config.model import ZOO
from trinity.models import Role, Trinity, parameter_roles
from trinity.optim import Muon, orthogonalize, rate_factor
from trinity.optim.newton_schulz import newton_schulz_flops

RATE, MOMENTUM, DECAY = 1e-3, 0.95, 0.01
TOKENS = {"cpu": 2048, "cuda": 524288}
"""Tokens of a step that such a run would take, beside which the seconds are to be read."""

STEPS = 5  # of Newton-Schulz, everyone's default
NANO_TOKENS = (65536, 524288)
"""Tokens a step for which Muon's share of Nano's step is told."""
NANO_GFLOP_PER_TOKEN, NANO_TOKENS_PER_SECOND = 6.25, 78e3
"""Forward and backward of Nano; how fast one H200 may do them is a prediction, not a measurement."""


def run(quick: bool) -> dict[str, Any]:
    """Measure every contender; returns the figures and what they were measured on."""
    from benchmarks.step import machine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    own = "bfloat16" if device == "cuda" else "float32"
    parts = _parts(_model(device))
    contenders: dict[str, Callable[[], None]] = {}
    for part, owned in parts.items():
        contenders[f"{part}, {own}: ours"] = Muon(owned, lr=RATE, dtype=getattr(torch, own)).step
        if device == "cuda":
            torchs = Muon(owned, lr=RATE, dtype=getattr(torch, own), kernel="reference")
            contenders[f"{part}, {own}: ours, kernel=reference"] = torchs.step
        contenders[f"{part}, {own}: a loop over matrices"] = _loop(owned, getattr(torch, own))
    if own != "bfloat16":
        contenders["dense, bfloat16: ours"] = Muon(parts["dense"], lr=RATE).step
    contenders["dense, bfloat16: torch.optim.Muon"] = _of_torch(parts["dense"])
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in tqdm(range(2 if quick else 8), unit="round", file=sys.stderr, disable=None):
        for name, step in contenders.items():
            seconds[name].append(_seconds(step, device))
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first warms up
    flops = {part: _flops(owned) for part, owned in parts.items()}
    return {
        "on": machine(),
        "matrices": {part: sum(r.parameter.shape[:-2].numel() * len(r.rows) for r in parts[part]) for part in parts},
        "tokens_per_step": TOKENS[device],
        "flops": flops,
        "seconds": medians,
        "nano": _nano_seconds(medians, flops, own) if device == "cuda" else {},
    }


def table(results: dict[str, Any]) -> str:
    """The figures as a Markdown table, with ratios to ours."""
    counts = ", ".join(f"{count} {part}" for part, count in results["matrices"].items())
    lines = [
        f"{results['on']}; {counts} matrices; such a run has {results['tokens_per_step']} tokens a step",
        "",
        "| | step, s | against ours | TFLOP/s |",
        "|---|---|---|---|",
    ]
    for name, seconds in results["seconds"].items():
        ours = results["seconds"][name.split(":")[0] + ": ours"]
        speed = results["flops"][name.split(",")[0]] / seconds / 1e12
        lines.append(f"| {name} | {seconds:.4f} | {seconds / ours:.2f} | {speed:.3g} |")
    return "\n".join([*lines, *_shares(results["nano"])])


def _shares(nano: dict[str, float]) -> list[str]:
    """Muon's seconds for the whole of Nano beside those of a step without it."""
    if not nano:
        return []
    speed = NANO_TOKENS_PER_SECOND * NANO_GFLOP_PER_TOKEN / 1e3
    lines = [
        "",
        f"Nano on one GPU. Muon is measured; the rest of the step is a prediction at {NANO_TOKENS_PER_SECOND:,.0f} "
        f"tokens/s ({speed:.0f} TFLOP/s at {NANO_GFLOP_PER_TOKEN} GFLOP a token).",
        "",
        "| | Muon, s | " + " | ".join(f"of a step of {tokens:,} tokens" for tokens in NANO_TOKENS) + " |",
        "|---|---|" + "---|" * len(NANO_TOKENS),
    ]
    for name, seconds in nano.items():
        shares = (seconds / (seconds + tokens / NANO_TOKENS_PER_SECOND) for tokens in NANO_TOKENS)
        lines.append(f"| {name} | {seconds:.4f} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    return lines


def _nano_seconds(seconds: dict[str, float], flops: dict[str, float], dtype: str) -> dict[str, float]:
    """Each of our contenders' seconds for all matrices of Nano, part by part in proportion to the flops."""
    with torch.device("meta"):
        whole = {part: _flops(owned) for part, owned in _parts(Trinity(ZOO["nano"])).items()}
    return {
        name: sum(seconds[f"{part}, {dtype}: {name}"] * whole[part] / flops[part] for part in whole)
        for name in ("ours", "ours, kernel=reference")
    }


def _flops(roles: list[Role]) -> float:
    """Of Newton-Schulz on all their matrices."""
    return sum(
        role.parameter.shape[:-2].numel() * newton_schulz_flops(rows, role.parameter.shape[-1], STEPS)
        for role in roles
        for rows in role.rows
    )


def _parts(model: Trinity) -> dict[str, list[Role]]:
    """What Muon owns, as matrices and as experts."""
    roles = [role for role in parameter_roles(model) if role.kind in ("matrix", "router", "experts")]
    return {"dense": [r for r in roles if r.kind != "experts"], "experts": [r for r in roles if r.kind == "experts"]}


def _model(device: str) -> Trinity:
    config = ZOO["smoke"] if device == "cpu" else replace(ZOO["nano"], layers=4, dense_layers=1, vocab_size=512)
    with torch.device(device):
        model = Trinity(config)
    model.init_weights(0)
    generator = torch.Generator(device).manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, device=device)
    return model


def _loop(roles: list[Role], dtype: torch.dtype) -> Callable[[], None]:
    """The same update, one matrix after the other."""
    matrices: list[tuple[Tensor, Tensor, Tensor]] = []
    for role in roles:
        momentum = torch.zeros_like(role.parameter)
        tensors = (role.parameter.detach(), role.parameter.grad, momentum)
        for pieces in zip(*(tensor.split(role.rows, dim=-2) for tensor in tensors)):
            matrices += zip(*(piece.reshape(-1, *piece.shape[-2:]).unbind() for piece in pieces))

    @torch.no_grad()
    def step() -> None:
        for weight, gradient, momentum in matrices:
            momentum.mul_(MOMENTUM).add_(gradient)
            update = orthogonalize(gradient + MOMENTUM * momentum, dtype=dtype)
            weight.mul_(1 - RATE * DECAY).add_(update, alpha=-RATE * rate_factor(*weight.shape))

    return step


def _of_torch(roles: list[Role]) -> Callable[[], None]:
    """torch.optim.Muon over copies of the same matrices, fused ones taken apart."""
    parameters = []
    for role in roles:
        for weight, gradient in zip(*(x.detach().split(role.rows) for x in (role.parameter, role.parameter.grad))):
            parameter = torch.nn.Parameter(weight.clone())
            parameter.grad = gradient.clone()
            parameters.append(parameter)
    return torch.optim.Muon(parameters, lr=RATE, momentum=MOMENTUM, weight_decay=DECAY).step


def _seconds(step: Callable[[], None], device: str) -> float:
    began = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
