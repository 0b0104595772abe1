"""Muon's step: trinity.optim.Muon against a loop over matrices, and against torch.optim.Muon on the dense part.

The matrices are those of a model of the zoo: of configs/smoke.yaml on a CPU, of four layers of Nano on a GPU.
trinity.optim.Muon ("ours") batches all matrices of a shape. The loop is the same update for one matrix at a time.
torch.optim.Muon takes two dimensions only and multiplies in bf16: it is measured on the dense part only, with "ours" in
bf16 beside it. Products are in fp32 on a CPU, in bf16 on a GPU. On a GPU "ours" uses the Triton kernels, and
"kernel=reference" torch's batched GEMM. Each figure is the median over steps; the contenders take turns.

TFLOP/s count every product of Newton-Schulz in full (`newton_schulz_flops`) for all contenders: a contender that
computes half of a symmetric product reaches more TFLOP/s, not fewer flops. The seconds include momentum, decay and
update.

On a GPU the table ends with Muon's share of a step of the whole of Nano on that GPU. Muon's seconds are measured, and
scaled by flops from these layers to all; the rest of the step is a prediction.
"""

import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from benchmarks.timing import Marks, record, take_turns
from torch import Tensor
from tqdm import tqdm

from trinity.config.model import ZOO
from trinity.models import Role, Trinity, parameter_roles
from trinity.optim import Muon, orthogonalize, rate_factor
from trinity.optim.newton_schulz import newton_schulz_flops

RATE, MOMENTUM, DECAY = 1e-3, 0.95, 0.01
TOKENS = {"cpu": 2048, "cuda": 524288}
"""Tokens of a step of a typical run on this device, to compare the seconds with."""

STEPS = 5  # of Newton-Schulz, the default of all contenders
NANO_TOKENS = (65536, 524288)
"""Tokens per step for which the table gives Muon's share of Nano's step."""
NANO_GFLOP_PER_TOKEN, NANO_TOKENS_PER_SECOND = 6.25, 78e3
"""Forward and backward of Nano; the speed of one H200 is a prediction, not a measurement."""


def run(quick: bool, *, names: Collection[str] | None = None) -> dict[str, Any]:
    """Measure every contender; return the figures and the machine.

    Args:
        names: of the contenders to measure; all by default.
    """
    from benchmarks.step import machine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    parts = _parts(_model(device))
    contenders: dict[str, Callable[[], None]] = {}
    for part, owned in parts.items():
        contenders[f"{part}, {dtype}: ours"] = Muon(owned, lr=RATE, dtype=getattr(torch, dtype)).step
        if device == "cuda":
            reference = Muon(owned, lr=RATE, dtype=getattr(torch, dtype), kernel="reference")
            contenders[f"{part}, {dtype}: ours, kernel=reference"] = reference.step
        contenders[f"{part}, {dtype}: a loop over matrices"] = _loop(owned, getattr(torch, dtype))
    if dtype != "bfloat16":
        contenders["dense, bfloat16: ours"] = Muon(parts["dense"], lr=RATE).step
    contenders["dense, bfloat16: torch.optim.Muon"] = _torch_muon(parts["dense"])
    groups: dict[str, dict[str, Callable[[Marks], None]]] = {}  # contenders with the same matrices and dtype
    for name, step in contenders.items():
        if names is None or name in names:
            groups.setdefault(name.split(":")[0], {})[name] = _timed(step)
    found = {}
    for group in tqdm(groups.values(), unit="group", file=sys.stderr, disable=None):
        found |= take_turns(group, 1 if quick else 7, record)
    medians = {name: figures["seconds"][0] for name, figures in found.items() if "seconds" in figures}
    flops = {part: _flops(owned) for part, owned in parts.items()}
    return {
        "on": machine(),
        "matrices": {part: sum(r.parameter.shape[:-2].numel() * len(r.rows) for r in parts[part]) for part in parts},
        "tokens_per_step": TOKENS[device],
        "flops": flops,
        "seconds": medians,
        "failed": {name: figures["failed"] for name, figures in found.items() if "failed" in figures},
        "nano": _nano_seconds(medians, flops, dtype) if device == "cuda" else {},
    }


def table(results: dict[str, Any]) -> str:
    """The figures as a Markdown table, with ratios to trinity.optim.Muon."""
    counts = ", ".join(f"{count} {part}" for part, count in results["matrices"].items())
    lines = [
        f"{results['on']}; {counts} matrices; such a run has {results['tokens_per_step']} tokens a step",
        "",
        "| | step, s | against ours | TFLOP/s |",
        "|---|---|---|---|",
    ]
    for name, seconds in results["seconds"].items():
        ours = results["seconds"].get(name.split(":")[0] + ": ours")
        speed = results["flops"][name.split(",")[0]] / seconds / 1e12
        against = f"{seconds / ours:.2f}" if ours else ""
        lines.append(f"| {name} | {seconds:.4f} | {against} | {speed:.3g} |")
    lines += [f"| {name} | {reason} | | |" for name, reason in results["failed"].items()]
    return "\n".join([*lines, *_shares(results["nano"])])


def _shares(nano: dict[str, float]) -> list[str]:
    """Lines of a table: Muon's seconds for the whole of Nano, and its share of a step."""
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
    """Seconds of trinity's contenders for all matrices of Nano, scaled part by part in proportion to the flops."""
    with torch.device("meta"):
        whole = {part: _flops(owned) for part, owned in _parts(Trinity(ZOO["nano"])).items()}
    return {
        name: sum(seconds[f"{part}, {dtype}: {name}"] * whole[part] / flops[part] for part in whole)
        for name in ("ours", "ours, kernel=reference")
        if all(f"{part}, {dtype}: {name}" in seconds for part in whole)
    }


def _flops(roles: list[Role]) -> float:
    """Flops of Newton-Schulz on all matrices of the roles."""
    return sum(
        role.parameter.shape[:-2].numel() * newton_schulz_flops(rows, role.parameter.shape[-1], STEPS)
        for role in roles
        for rows in role.rows
    )


def _parts(model: Trinity) -> dict[str, list[Role]]:
    """The parameters of Muon: dense matrices, and experts."""
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
    """A step of the same update, one matrix after the other."""
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


def _torch_muon(roles: list[Role]) -> Callable[[], None]:
    """A step of torch.optim.Muon over copies of the same matrices, packed ones split."""
    parameters = []
    for role in roles:
        for weight, gradient in zip(*(x.detach().split(role.rows) for x in (role.parameter, role.parameter.grad))):
            parameter = torch.nn.Parameter(weight.clone())
            parameter.grad = gradient.clone()
            parameters.append(parameter)
    return torch.optim.Muon(parameters, lr=RATE, momentum=MOMENTUM, weight_decay=DECAY).step


def _timed(step: Callable[[], None]) -> Callable[[Marks], None]:
    return lambda mark: step()
