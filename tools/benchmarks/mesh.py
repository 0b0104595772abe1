"""A training step of configs/smoke.yaml on one and on several processes, with the same batch: tokens/s and waiting.

Processes share the machine's cores, or have a GPU each. "Waiting" is the part of a step in which a process waits for a
collective, including the wait for slower ranks. Muon's share includes its communication. Each figure is the median over
the steps of all rounds; the meshes take turns.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trinity.io.json_files import to_json

ROWS, LENGTH = 8, 256
MESHES = {
    "1 process": (1, []),
    "2, shard 2": (2, ["parallel.shard=2"]),
    "2, shard 2, expert 2": (2, ["parallel.shard=2", "parallel.expert=2"]),
    "2, replicate 2": (2, ["parallel.replicate=2", "parallel.shard=1"]),
}


def run(quick: bool) -> dict[str, Any]:
    """Measure every mesh for which there are enough devices; return the figures and the machine."""
    from benchmarks.step import machine

    rounds, steps = (1, 2) if quick else (3, 6)
    meshes = {name: mesh for name, mesh in MESHES.items() if mesh[0] <= _devices()}
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in meshes}
    for name in tqdm([name for _ in range(rounds) for name in meshes], unit="run", file=sys.stderr, disable=None):
        samples[name].append(_launch(*meshes[name], steps))
    medians = {
        name: {key: statistics.median(value for sample in found for value in sample[key]) for key in found[0]}
        for name, found in samples.items()
    }
    return {"on": machine(), "tokens_per_step": ROWS * LENGTH, "meshes": medians}


def table(results: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    tokens, meshes = results["tokens_per_step"], results["meshes"]
    one = meshes["1 process"]["step"]
    lines = [
        f"{results['on']}; {tokens} tokens a step, in all",
        "",
        "| | step, s | tokens/s | against one | waiting | Muon's share |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in meshes.items():
        lines.append(
            f"| {name} | {found['step']:.3f} | {tokens / found['step']:,.0f} | {one / found['step']:.2f} "
            f"| {found['waiting'] / found['step']:.0%} | {found['muon'] / found['step']:.0%} |"
        )
    return "\n".join(lines)


def _devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else os.cpu_count() or 1


def _launch(world: int, words: list[str], steps: int) -> dict[str, list[float]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    done = subprocess.run([*command, __file__, str(steps), *words], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{world} processes with {words}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(steps: int, words: list[str]) -> dict[str, list[float]]:
    """Seconds of each step, of its waits and of Muon, on this rank, after one step of warm-up."""
    import torch

    from trinity.config.load import load_config
    from trinity.data.stream.collate import Batch
    from trinity.parallel import mesh
    from trinity.training.build import build_model, make_optimizers
    from trinity.training.train_step import train_step

    config = load_config("configs/smoke.yaml", [f"batch.sequences={ROWS}", *words])
    ranks = mesh.start(config.parallel, config.model, None, False)
    model = build_model(config, ranks)
    model.init_weights(0)
    optimizers = make_optimizers(config, model)
    text = torch.randint(config.model.vocab_size, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    rows = text[ranks.rank :: ranks.world]
    batch = Batch(rows[:, :-1], rows[:, 1:], None)
    clocks = {"waiting": _clock_waits(), "muon": _clock(optimizers.muon, "step")}
    seconds: dict[str, list[float]] = {"step": [], "waiting": [], "muon": []}
    for _ in range(steps + 1):
        before = {name: clock[0] for name, clock in clocks.items()}
        began = time.perf_counter()
        train_step(model, optimizers, batch, config, 1.0, ranks)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        seconds["step"].append(time.perf_counter() - began)
        for name, clock in clocks.items():
            seconds[name].append(clock[0] - before[name])
    if ranks.is_first:
        print(to_json({name: values[1:] for name, values in seconds.items()}))
    mesh.stop()
    return seconds


def _clock(owner: Any, name: str) -> list[float]:
    """Wrap a method to add up the seconds spent in it; return the one-element list that holds the sum."""
    seconds = [0.0]
    setattr(owner, name, _timed(getattr(owner, name), seconds))
    return seconds


def _clock_waits() -> list[float]:
    """Add up the seconds in which this thread waits for a collective; return the one-element list that holds the sum.

    On a GPU the device's streams wait and the host hardly ever does: use a profile there instead.
    """
    import torch.distributed as dist

    from trinity.parallel import token_dispatcher

    seconds = [0.0]
    dist.Work.wait = _timed(dist.Work.wait, seconds)
    token_dispatcher.wait = _timed(token_dispatcher.wait, seconds)
    return seconds


def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[0] += time.perf_counter() - began

    return call


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    _measure(int(sys.argv[1]), sys.argv[2:])
