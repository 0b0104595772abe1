"""A training step of configs/smoke.yaml's model against transformers' AfMoE of the same size and weights.

Each contender runs in a separate process, so that its peak memory can be measured. Contenders take turns over several
rounds, so that a busy moment of the machine does not hit one of them only; each figure is the median over all rounds.
Trinity: as in training, under FSDP2 on a mesh of one, fp32 master weights, Muon and AdamW. transformers: every experts
implementation that runs here, sdpa attention, weights in the compute dtype, torch's fused AdamW.

On a GPU the suite starts with the whole of Nano: see benchmarks/nano_step.py.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trinity.io.json_files import to_json

ROWS, LENGTH = 8, 256
TRANSFORMERS_EXPERTS = ("eager", "batched_mm", "grouped_mm")
DTYPES = ("float32", "bfloat16")
TIMEOUT = 90  # seconds for one contender's turn; a slower engine is not the fastest one of transformers


def run(quick: bool) -> dict[str, Any]:
    """Measure every contender; return the figures and the machine."""
    import torch
    from benchmarks import nano_step
    from benchmarks.timing import out_of_time

    nano = nano_step.run(quick) if torch.cuda.is_available() else None
    quick = quick or nano is not None  # the small model is too small for a GPU
    rounds, steps = (1, 2) if quick else (2, 4)
    contenders = [("trinity", dtype) for dtype in DTYPES]
    engines = TRANSFORMERS_EXPERTS[-1:] if quick else TRANSFORMERS_EXPERTS
    contenders += [(f"transformers {experts}", dtype) for experts in engines for dtype in DTYPES]
    samples: dict[str, list[dict[str, Any]]] = {}
    turns = [contender for _ in range(rounds) for contender in contenders]
    with tempfile.TemporaryDirectory() as folder:
        _export(Path(folder) / "export")
        for name, dtype in tqdm(turns, unit="run", file=sys.stderr, disable=None):
            earlier = samples.setdefault(f"{name} {dtype}", [])
            if out_of_time():
                earlier[:] = earlier or [{"failed": "not measured: the suite's time was up"}]
            elif not any("failed" in sample for sample in earlier):
                earlier.append(_in_process(name, dtype, steps, Path(folder) / "export"))
    return {
        "on": machine(),
        "tokens_per_step": ROWS * LENGTH,
        "contenders": {k: _median(v) for k, v in samples.items()},
    } | ({"nano": nano} if nano else {})


def table(results: dict[str, Any]) -> str:
    """The figures as a Markdown table, with ratios to the fastest engine of transformers in the same dtype."""
    tokens = results["tokens_per_step"]
    lines = [
        f"{results['on']}; {tokens} tokens a step",
        "",
        "| | forward + backward, s | tokens/s | whole step, s | tokens/s | optimizer's share | peak memory, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in results["contenders"].items():
        if "failed" in found:
            lines.append(f"| {name} | does not run here: {found['failed']} | | | | | |")
            continue
        gradient, whole = found["gradient_seconds"], found["step_seconds"]
        lines.append(
            f"| {name} | {gradient:.3f} | {tokens / gradient:,.0f} | {whole:.3f} | {tokens / whole:,.0f} "
            f"| {1 - gradient / whole:.0%} | {found['memory_gib']:.2f} |"
        )
    lines += ["", *_ratios(results["contenders"])]
    if "nano" in results:
        from benchmarks import nano_step

        lines = [nano_step.table(results["nano"]), "", *lines]
    return "\n".join(lines)


def _ratios(contenders: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for dtype in DTYPES:
        peers = {k: v for k, v in contenders.items() if k.startswith("transformers") and k.endswith(dtype)}
        peers = {k: v for k, v in peers.items() if "failed" not in v}
        if not peers:
            continue
        best = min(peers, key=lambda name: peers[name]["gradient_seconds"])
        trinity, peer = contenders[f"trinity {dtype}"], peers[best]
        if "failed" in trinity:
            continue
        gradient, step, memory = (
            trinity[key] / peer[key] for key in ("gradient_seconds", "step_seconds", "memory_gib")
        )
        lines.append(
            f"{dtype}: trinity takes {gradient:.2f} of the time of {best} for forward + backward, {step:.2f} for the "
            f"whole step, and {memory:.2f} of its memory"
        )
    return lines


def machine() -> str:
    """The machine and versions, for the table."""
    import torch

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {versions}"
    bf16 = "with" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "without"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}, {bf16} bf16 arithmetic), {versions}"


def _median(samples: list[dict[str, Any]]) -> dict[str, Any]:
    for sample in samples:
        if "failed" in sample:
            return sample
    return {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}


def _export(folder: Path) -> None:
    """Export initial weights for transformers: both sides then route the same tokens to the same experts."""
    import torch

    from trinity.config.load import load_config
    from trinity.interop import export_hf
    from trinity.models import Trinity

    model = Trinity(load_config("configs/smoke.yaml").model)
    model.init_weights(0)
    export_hf(model, folder, dtype=torch.float32)


def _in_process(name: str, dtype: str, steps: int, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, name, dtype, str(steps), str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"failed": f"{steps + 1} steps take more than {TIMEOUT} s"}
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:120]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(gradient: Callable[[], None], update: Callable[[], None], steps: int, held: float) -> dict[str, Any]:
    """Median seconds of forward + backward and of the whole step, after one step of warm-up.

    Args:
        held: GiB that the process used before it built the model; subtracted from the peak.
    """
    import torch

    from trinity.hardware import memory_gib

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock: list[tuple[float, float]] = []
    for _ in range(steps + 1):
        times = [_now(device)]
        for part in (gradient, update):
            part()
            times.append(_now(device))
        clock.append((times[1] - times[0], times[2] - times[0]))
    return {
        "gradient_seconds": statistics.median(pair[0] for pair in clock[1:]),
        "step_seconds": statistics.median(pair[1] for pair in clock[1:]),
        "memory_gib": memory_gib(device) - held,
    }


def _memory_of_imports() -> float:
    """GiB used by this process now, by imported libraries; 0 on a GPU, whose allocator counts tensors only."""
    import torch

    from trinity.hardware import memory_gib

    return 0.0 if torch.cuda.is_available() else memory_gib(torch.device("cpu"))


def _now(device: Any) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _trinity_step(dtype: str, steps: int) -> dict[str, Any]:
    import torch

    from trinity.config.load import load_config
    from trinity.optim.grad_clip import clip_, global_norm
    from trinity.parallel import mesh
    from trinity.parallel.grad_accumulation import end_accumulation, set_reduction
    from trinity.training.build import build_model, make_optimizers

    held = _memory_of_imports()
    config = load_config("configs/smoke.yaml", [f"precision.compute={dtype}"])
    ranks = mesh.start(config.parallel, config.model, None, False)
    model = build_model(config, ranks)
    model.init_weights(0)
    optimizers = make_optimizers(config, model)
    tokens, targets = _text(config.model.vocab_size)

    def gradient() -> None:
        set_reduction(model, last=True, defer=True)
        losses = model(tokens.to(ranks.device), targets_BS=targets.to(ranks.device))
        (losses.token_loss / tokens.numel()).backward()
        end_accumulation(model)

    def update() -> None:
        gradients = [parameter.grad for parameter in model.parameters()]
        clip_(gradients, global_norm(gradients), 1.0)
        optimizers.step()
        optimizers.zero_grad()

    figures = measure(gradient, update, steps, held)
    mesh.stop()
    assert torch.isfinite(model.norm.gain.full_tensor()).all()
    return figures


def _transformers_step(experts: str, dtype: str, steps: int, folder: str) -> dict[str, Any]:
    import torch
    from transformers import AfmoeForCausalLM

    held = _memory_of_imports()
    model = AfmoeForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), experts_implementation=experts, attn_implementation="sdpa"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens, targets = (tensor.to(device) for tensor in _text(model.config.vocab_size))

    def gradient() -> None:
        logits = model(tokens, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten()).backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return measure(gradient, update, steps, held)


def _text(vocabulary: int) -> tuple[Any, Any]:
    import torch

    tokens = torch.randint(vocabulary, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


if __name__ == "__main__":
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    contender, precision, repetitions, export = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    engine = contender.removeprefix("transformers ")
    if contender == "trinity":
        print(to_json(_trinity_step(precision, repetitions)))
    else:
        print(to_json(_transformers_step(engine, precision, repetitions, export)))
