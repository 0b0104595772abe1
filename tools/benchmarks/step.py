"""A training step of configs/smoke.yaml's model against transformers' AfMoE of the same size and weights.

Every contender is a process of its own, so that its peak memory can be measured. First each experts implementation of
transformers takes a few steps; then the fastest one and Trinity take turns, step by step, so that a busy moment of the
machine hits both. A ratio is the median of the ratios of these pairs; the table has medians over all steps.
Trinity: as in training, under FSDP2 on a mesh of one, fp32 master weights, Muon and AdamW. transformers: sdpa
attention, weights in the compute dtype, torch's fused AdamW.

On a GPU the suite starts with the whole of Nano: see benchmarks/nano_step.py.
"""

import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm import tqdm

from trinity.io.json_files import to_json

ROWS, LENGTH = 8, 256
TRANSFORMERS_EXPERTS = ("grouped_mm", "eager", "batched_mm")
DTYPES = ("float32", "bfloat16")
TRIALS = 3
"""Steps by which the fastest experts implementation of transformers is chosen, the first not counted."""

Part = Callable[[], None]
"""Part of a step of one contender."""

TIMEOUT = 60
"""Seconds that a contender has for its start, and then for each step; a slower one is not the fastest."""


def run(quick: bool) -> dict[str, Any]:
    """Measure every contender; return the figures and the machine."""
    import torch
    from benchmarks import nano_step

    nano = nano_step.run(quick) if torch.cuda.is_available() else None
    quick = quick or nano is not None  # the small model is too small for a GPU
    engines, pairs = (TRANSFORMERS_EXPERTS[:1], 2) if quick else (TRANSFORMERS_EXPERTS, 9)
    found: dict[str, Any] = {"on": machine(), "tokens_per_step": ROWS * LENGTH, "contenders": {}, "ratios": {}}
    with tempfile.TemporaryDirectory() as folder:
        _export(Path(folder) / "export")
        for dtype in DTYPES:
            _compare(dtype, engines, pairs, Path(folder) / "export", found)
    return found | ({"nano": nano} if nano else {})


def table(results: dict[str, Any]) -> str:
    """The figures as a Markdown table, and the ratios to the fastest engine of transformers in the same dtype."""
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
    lines += [""]
    for dtype, ratio in results["ratios"].items():
        lines.append(
            f"{dtype}: trinity takes {_range(ratio['gradient'])} of the time of {ratio['peer']} for forward + "
            f"backward, {_range(ratio['step'])} for the whole step (medians of {ratio['pairs']} pairs), and "
            f"{ratio['memory']:.2f} of its memory"
        )
    if "nano" in results:
        from benchmarks import nano_step

        lines = [nano_step.table(results["nano"]), "", *lines]
    return "\n".join(lines)


def _range(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _compare(dtype: str, engines: tuple[str, ...], pairs: int, export: Path, found: dict[str, Any]) -> None:
    """Choose the fastest engine in one dtype, and measure it in turn with Trinity; add to `found`."""
    from benchmarks.timing import out_of_time

    contenders = found["contenders"]
    for engine in tqdm(engines, desc=f"{dtype}: engines", unit="run", file=sys.stderr, disable=None):
        name = f"transformers {engine}"
        contenders[f"{name} {dtype}"] = _alone(Contender(name, dtype, export), TRIALS)
    peers = {name: row for name, row in contenders.items() if name.endswith(dtype) and "failed" not in row}
    if not peers or out_of_time():
        return
    peer = min(peers, key=lambda name: peers[name]["gradient_seconds"])
    both = [Contender("trinity", dtype, export), Contender(peer.removesuffix(f" {dtype}"), dtype, export)]
    samples: list[list[dict[str, float]]] = [[], []]
    try:
        for contender in both:
            contender.step()  # warm-up
        for index in tqdm(range(pairs), desc=f"{dtype}: pairs", unit="pair", file=sys.stderr, disable=None):
            for which in (0, 1) if index % 2 else (1, 0):
                samples[which].append(both[which].step())
    except Failed as failure:
        contenders[f"trinity {dtype}"] = {"failed": str(failure)}
        return
    finally:
        for contender in both:
            contender.close()
    contenders[f"trinity {dtype}"], contenders[peer] = (_median(rows) for rows in samples)
    ratio = {key: [a[f"{key}_seconds"] / b[f"{key}_seconds"] for a, b in zip(*samples)] for key in ("gradient", "step")}
    memory = samples[0][-1]["memory_gib"] / samples[1][-1]["memory_gib"]
    found["ratios"][dtype] = ratio | {"peer": peer, "pairs": pairs, "memory": memory}


def _alone(contender: "Contender", steps: int) -> dict[str, Any]:
    """Medians of a contender's steps after the first, or the reason why it does not run."""
    try:
        return _median([contender.step() for _ in range(steps)][1:])
    except Failed as failure:
        return {"failed": str(failure)}
    finally:
        contender.close()


def _median(samples: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}


class Failed(Exception):
    """A contender did not run, or took too long; the message says why."""


class Contender:
    """One implementation in a process of its own, which takes a step on request.

    Args:
        name: "trinity", or "transformers ENGINE".
        dtype: the compute dtype.
        export: folder of the weights that transformers loads.
    """

    def __init__(self, name: str, dtype: str, export: Path) -> None:
        command = [sys.executable, __file__, name, dtype, str(export)]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self._ready = self._late = False

    def step(self) -> dict[str, float]:
        """Take one step: seconds of forward + backward and of the whole step, and the peak memory so far.

        Raises:
            Failed: the process ended, or did not answer within TIMEOUT.
        """
        if not self._ready:
            self._answer()
            self._ready = True
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise Failed(self._reason()) from error
        return json.loads(self._answer())

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        late = threading.Timer(TIMEOUT, self._end_late)
        late.start()
        line = self._process.stdout.readline()
        late.cancel()
        if not line:
            raise Failed(self._reason())
        return line

    def _end_late(self) -> None:
        self._late = True
        self._process.kill()

    def _reason(self) -> str:
        """Why the process ended: its time was up, a signal from outside, or the last line of its error output."""
        code = self._process.wait()
        if self._late:
            return f"a step takes more than {TIMEOUT} s"
        if code == -signal.SIGKILL:
            return "killed by SIGKILL, as the system does if memory is short"
        self._errors.seek(0)
        return (self._errors.read().strip().splitlines() or ["it ended"])[-1][:120]


def machine() -> str:
    """The machine and versions, for the table."""
    import torch

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {versions}"
    bf16 = "with" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "without"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}, {bf16} bf16 arithmetic), {versions}"


def _export(folder: Path) -> None:
    """Export initial weights for transformers: both sides then route the same tokens to the same experts."""
    import torch

    from trinity.config.load import load_config
    from trinity.interop import export_hf
    from trinity.models import Trinity

    model = Trinity(load_config("configs/smoke.yaml").model)
    model.init_weights(0)
    export_hf(model, folder, dtype=torch.float32)


def serve(contender: str, dtype: str, export: str) -> None:
    """Run one contender: a line on stdin asks for a step, and the answer is a line of JSON on stdout."""
    import torch

    from trinity.hardware import memory_gib

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print does not count as an answer
    held = _memory_of_imports()
    make = _trinity if contender == "trinity" else _transformers
    gradient, update = make(contender, dtype, export)
    torch.set_num_threads(os.cpu_count() or 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        times = [_now(device)]
        for part in (gradient, update):
            part()
            times.append(_now(device))
        seconds = {"gradient_seconds": times[1] - times[0], "step_seconds": times[2] - times[0]}
        print(to_json(seconds | {"memory_gib": memory_gib(device) - held}), file=answers, flush=True)


def _memory_of_imports() -> float:
    """GiB used by this process now, by imported libraries; 0 on a GPU, whose allocator counts tensors only."""
    import torch

    from trinity.hardware import memory_gib

    return 0.0 if torch.cuda.is_available() else memory_gib(torch.device("cpu"))


def _now(device: Any) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def _trinity(_: str, dtype: str, export: str) -> tuple[Part, Part]:
    """Forward + backward, and the update, of Trinity."""
    from trinity.config.load import load_config
    from trinity.optim.grad_clip import clip_, global_norm
    from trinity.parallel import mesh
    from trinity.parallel.grad_accumulation import end_accumulation, set_reduction
    from trinity.training.build import build_model, make_optimizers

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

    return gradient, update


def _transformers(contender: str, dtype: str, export: str) -> tuple[Part, Part]:
    """The same of transformers."""
    import torch
    from transformers import AfmoeForCausalLM

    model = AfmoeForCausalLM.from_pretrained(
        export,
        dtype=getattr(torch, dtype),
        experts_implementation=contender.removeprefix("transformers "),
        attn_implementation="sdpa",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.nn.Module.to(model, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens, targets = (tensor.to(device) for tensor in _text(model.config.vocab_size))

    def gradient() -> None:
        logits = model(tokens, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten()).backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return gradient, update


def _text(vocabulary: int) -> tuple[Any, Any]:
    import torch

    tokens = torch.randint(vocabulary, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


if __name__ == "__main__":
    serve(*sys.argv[1:])
