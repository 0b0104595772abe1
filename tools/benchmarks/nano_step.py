"""Trinity Nano whole on one GPU: forward + backward of a microbatch, and whole steps with clipping, Muon and AdamW.

The config is configs/nano_1gpu.yaml: 6.1B parameters in bf16 with fp32 masters, rows of 4096. Each variant runs in a
separate process with a time limit: one that runs out of memory or time is a row of the table and keeps the rows before.
Weights are random numbers and routing is forced (benchmarks.experts: balanced, or Zipf), so that a step costs as much
as in the middle of a run. A GPU that cannot hold the whole model gets 28 of the 56 layers: 3.17B parameters, 44 GB of
state, and a head with 34 % of the FLOPs instead of 20. MFU is trinity.models.flops.flops_per_token over the data
sheet's peak.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from trinity.io.json_files import to_json

CONFIG = "configs/nano_1gpu.yaml"
TOKENS = (65_536, 524_288)
"""Tokens of the measured steps."""

TIMEOUT = 75
"""Time limit of one variant in seconds, including its start."""

WHOLE_MODEL_BYTES = 100e9
"""Memory of a GPU that can hold the whole model's state (75 GB) and its activations."""

SHORT = 28
"""Layers on a smaller GPU."""

VARIANTS = {
    "as configured": ("balanced", []),
    "defer_reduce off": ("balanced", ["parallel.defer_reduce=off"]),
    "blocks recomputed, microbatch 8": ("balanced", ["recompute=block", "batch.microbatch=8"]),
    "as configured, Zipf routing": ("Zipf", []),
}
"""Name → routing, and words of the command line."""


def run(quick: bool) -> dict[str, Any]:
    """Measure every variant: name → rows, each with figures or the reason of a failure."""
    title, layers = layers_that_fit()
    tokens = TOKENS[: 1 if quick else None]
    return {
        f"{title}, {name}": in_process(CONFIG, routing, [*words, *layers], tokens)
        for name, (routing, words) in VARIANTS.items()
    }


def layers_that_fit() -> tuple[str, list[str]]:
    """The model's name in the table, and the words that make it fit this GPU's memory."""
    import torch

    if torch.cuda.get_device_properties(0).total_memory >= WHOLE_MODEL_BYTES:
        return "Nano", []
    return f"Nano with {SHORT} of 56 layers", [f"model.layers={SHORT}"]


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| | tokens | s | tokens/s | MFU | peak memory, GiB |", "|---|---|---|---|---|---|"]
    for name, rows in found.items():
        for row in rows:
            if "failed" in row:
                lines.append(f"| {name} | {row['failed']} | | | | |")
                continue
            mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
            lines.append(
                f"| {name}: {row['what']} | {row['tokens']:,} | {row['seconds']:.3f} "
                f"| {row['tokens'] / row['seconds']:,.0f} | {mfu} | {row['memory_gib']:.1f} |"
            )
    return "\n".join(lines)


def in_process(config: str, routing: str, words: list[str], tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    """The rows of one variant, measured in a separate process; the last row is a failure if it did not finish."""
    from benchmarks.timing import time_left

    timeout = min(TIMEOUT, time_left())
    if timeout < 15:
        return [{"failed": "not measured: the suite's time was up"}]
    command = [sys.executable, __file__, config, routing, ",".join(map(str, tokens)), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        return [*_rows(output), {"failed": f"not at its end after {timeout:.0f} s"}]
    rows = _rows(done.stdout)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        rows.append({"failed": "out of memory" if "OutOfMemoryError" in done.stderr else last[:160]})
    return rows


def _rows(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"what"')]


class Setup(NamedTuple):
    """A model on its device, filled with random numbers, and one microbatch of random tokens."""

    config: Any
    ranks: Any
    model: Any
    microbatch: Any

    def gradient(self) -> None:
        """Forward and backward of the microbatch."""
        losses = self.model(self.microbatch.tokens_BS, targets_BS=self.microbatch.targets_BS)
        (losses.token_loss / self.microbatch.tokens_BS.numel()).backward()

    @property
    def tokens(self) -> int:
        """Tokens of the microbatch."""
        return self.microbatch.tokens_BS.numel()


def prepare(path: str, routing: str, words: list[str]) -> Setup:
    """The model of a config under FSDP2 on this process's device, with forced routing; see mesh.stop.

    Gradients are reduced as in a step's first microbatch, so parallel.defer_reduce counts.
    """
    from trinity.config.load import load_config
    from trinity.parallel import mesh
    from trinity.parallel.grad_accumulation import defers_reduction, set_reduction
    from trinity.training.build import build_model

    config = load_config(path, words)
    ranks = mesh.start(config.parallel, config.model, None, False)
    model = build_model(config, ranks)
    _fill(model)
    _force_routing(routing)
    set_reduction(model, last=False, defer=defers_reduction(config.parallel.defer_reduce, model, ranks, microbatches=2))
    size = config.batch.microbatch * config.data.sequence_length
    microbatch = next(_text(config, size).microbatches(config.batch.microbatch, ranks.device))
    return Setup(config, ranks, model, microbatch)


def measure(
    path: str,
    routing: str,
    tokens_of_steps: list[int],
    words: list[str],
    report: Callable[[dict[str, Any]], None],
    repeats: int = 3,
) -> None:
    """Measure one variant; each row is reported as soon as it is measured.

    Args:
        path: of the config; words are its overrides.
        report: called with {"what", "tokens", "seconds", "mfu", "memory_gib"}.
        repeats: microbatches, and steps of the first number of tokens, after one that warms up; medians are reported.
    """
    from trinity.hardware import memory_gib, peak_flops
    from trinity.models.flops import flops_per_token
    from trinity.parallel import mesh
    from trinity.training.build import make_optimizers
    from trinity.training.train_step import train_step

    setup = prepare(path, routing, words)
    config, ranks, model, _ = setup
    optimizers = make_optimizers(config, model)
    flops, peak = flops_per_token(config.model, config.data.sequence_length)["training"], peak_flops(ranks.device)

    def row(what: str, tokens: int, seconds: list[float]) -> None:
        median = statistics.median(seconds)
        mfu = None if peak is None else flops * tokens / median / peak
        memory = memory_gib(ranks.device)
        report({"what": what, "tokens": tokens, "seconds": median, "mfu": mfu, "memory_gib": memory})

    row("forward + backward", setup.tokens, [_seconds(setup.gradient) for _ in range(repeats + 1)][1:])
    optimizers.zero_grad()
    for index, tokens in enumerate(tokens_of_steps):
        batch = _text(config, tokens)
        taken = [
            _seconds(lambda: train_step(model, optimizers, batch, config, 1.0, ranks))  # noqa: B023
            for _ in range(repeats + 1 if index == 0 else 1)  # the first of all warms up
        ]
        row("a step", batch.tokens_BS.numel(), taken[1:] or taken)
    mesh.stop()


def _text(config: Any, tokens: int) -> Any:
    """A batch of random tokens, at least one row."""
    import torch

    from trinity.data.stream.collate import Batch

    length, random = config.data.sequence_length, torch.Generator().manual_seed(0)
    both = torch.randint(config.model.vocab_size, (max(1, tokens // length), length + 1), generator=random)
    return Batch(both[:, :-1], both[:, 1:], None)


def _seconds(call: Any) -> float:
    import torch

    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _fill(model: Any) -> None:
    """Random weights made on the device: the real initialization takes longer, and training costs the same."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = parameter.to_local()
            values.fill_(1.0) if name.endswith("gain") else values.normal_(0.0, model.config.init_std)
        for buffer in model.buffers():
            buffer.zero_()


def _force_routing(routing: str) -> None:
    """Make every router choose experts from a table; its own choice is made too, and dropped."""
    from functools import cache

    import torch
    from benchmarks.experts import balanced_routing, zipf_routing

    import trinity_kernels

    draw = {"balanced": balanced_routing, "Zipf": zipf_routing}[routing]

    @cache
    def table_of(tokens: int, experts: int, active: int, device: torch.device) -> tuple[Any, Any]:
        indices_TK = draw(tokens, experts, active).to(device)
        return indices_TK, torch.bincount(indices_TK.flatten(), minlength=experts)

    choose = trinity_kernels.route

    def route(scores_TE: Any, bias_E: Any, active: int, padding_T: Any = None, kernel: str = "auto") -> tuple[Any, Any]:
        choose(scores_TE, bias_E, active, padding_T, kernel=kernel)
        return table_of(*scores_TE.shape, active, scores_TE.device)

    trinity_kernels.route = route


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    sys.path[:0] = [str(Path(__file__).parents[1])]
    steps = [int(number) for number in sys.argv[3].split(",")]
    measure(sys.argv[1], sys.argv[2], steps, sys.argv[4:], lambda row: print(to_json(row), flush=True))
