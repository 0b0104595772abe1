"""What watching costs: a step at the defaults against one without logs, health checks and router figures.

On the smoke model and on one of about 100M parameters, in fp32, 8 rows of 256 random tokens a step, on one process. The
two take turns, step by step, in one process. Then a checkpoint: how long training stands still for an asynchronous
save, and for one that is waited for, with the size that is written.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from trinity.config.load import OmegaConf, build_config
from trinity.parallel import mesh
from trinity.training.loop import Training
from trinity.training.run_directory import RunDirectory

MODELS = {
    "smoke": {"name": "smoke"},
    "100M": {"name": "smoke", "width": 512, "layers": 12, "dense_width": 1536, "expert_width": 256, "heads": 8},
}
BARE = [
    "log.router_every=0", "health.spike.action=none", "health.heartbeat_seconds=0", "health.violation_factor=0",
    "health.dead_steps=0", "log.norms_every=0",
]  # fmt: skip


def run(quick: bool) -> dict[str, Any]:
    """Measure; returns the figures and what they were measured on."""
    from benchmarks.data import corpus_of
    from benchmarks.step import machine

    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        corpus_of(folder / "text", np.full(2000, 300), vocabulary=8192)
        for name, model in MODELS.items():
            if quick and name != "smoke":
                continue
            print(f"{name}: {3 if quick else 12} steps each", file=sys.stderr)
            found[name] = _measure(folder, name, model, 3 if quick else 12)
    return {"on": machine(), "found": found}


def table(results: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [f"{results['on']}; 2048 tokens a step, fp32, one process", ""]
    head = "| | parameters | step without, s | at the defaults, s | overhead | checkpoint | stall | waited for |"
    lines += [head, "|---|---|---|---|---|---|---|---|"]
    for name, row in results["found"].items():
        share = row["defaults"] / row["bare"] - 1
        cells = [
            name,
            f"{row['parameters'] / 1e6:.0f}M",
            f"{row['bare']:.3f}",
            f"{row['defaults']:.3f}",
            f"{share:+.1%}",
            f"{row['bytes'] / 1e6:.0f} MB",
            f"{row['stall']:.3f} s",
            f"{row['waited']:.3f} s",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _measure(folder: Path, name: str, model: dict, steps: int) -> dict[str, float]:
    kinds = {"bare": BARE, "defaults": []}
    configs = {kind: _config(folder, f"{name}-{kind}", model, words) for kind, words in kinds.items()}
    first = next(iter(configs.values()))
    ranks = mesh.start(first.parallel, first.model, None, False)
    runs = {}
    try:
        for kind, config in configs.items():
            directory = RunDirectory(Path(config.run.dir))
            runs[kind] = Training(config, ranks, directory, 0), directory
        seconds: dict[str, list[float]] = {kind: [] for kind in runs}
        for step in range(steps + 1):
            for kind, (training, _) in runs.items():
                began = time.perf_counter()
                training.log(training.one_step())
                if step:  # the first warms up
                    seconds[kind].append(time.perf_counter() - began)
        found = {kind: statistics.median(times) for kind, times in seconds.items()}
        return found | _checkpoints(runs["defaults"][0])
    finally:
        for training, directory in runs.values():
            training.close()
            directory.release()
        mesh.stop()


def _checkpoints(training: Training) -> dict[str, float]:
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    stalls, waits = [], []
    for _ in range(3):
        training.step += 1
        stalls.append(training.save(wait=False))
        training.saver.wait()
        training.step += 1
        began = time.perf_counter()
        training.save(wait=True)
        waits.append(time.perf_counter() - began)
    newest = max((training.directory.path / "checkpoints").glob("step_*"))
    size = sum(path.stat().st_size for path in newest.iterdir())
    return {
        "parameters": parameters, "stall": statistics.median(stalls), "waited": statistics.median(waits), "bytes": size
    }  # fmt: skip


def _config(folder: Path, name: str, model: dict, words: list[str]) -> Any:
    settings = {
        "run": {"name": name, "dir": str(folder / name), "steps": 1000},
        "model": model,
        "data": {"train": {"text": str(folder / "text")}, "sequence_length": 256, "document_mask": True},
        "batch": {"sequences": 8, "microbatch": 8},
        "optim": {"muon": {"dtype": "float32"}},
        "precision": {"compute": "float32"},
        "checkpoint": {"every": 0},
        "log": {"every": 1000},
    }
    return build_config([("bench", OmegaConf.create(settings)), ("bench", OmegaConf.from_dotlist(words))])
