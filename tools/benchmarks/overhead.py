"""Overhead of monitoring: steps at the defaults against steps without logs, health checks and router figures.

On the smoke model and on one of about 100M parameters, in fp32, 8 rows of 256 random tokens a step, on one process. The
two runs take turns, step by step, in one process. Each periodic measurement of the defaults is then switched on in a
step of its own and counted by its period. Then checkpoints: how long an asynchronous save stalls training, how long a
synchronous one takes, and the bytes written.

    overhead · bare = (defaults − bare) + Σ (step with it − defaults)/its period + stall/checkpoint.every

Each difference is the median over rounds of the difference between two steps of one round.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from trinity.checkpoint.directory import CheckpointDirectory
from trinity.config.load import OmegaConf, build_config
from trinity.config.run import CheckpointConfig, LogConfig
from trinity.parallel import mesh
from trinity.run_directory import RunDirectory
from trinity.training.resume import Origin
from trinity.training.trainer import Trainer

MODELS = {
    "smoke": {"name": "smoke"},
    "100M": {"name": "smoke", "width": 512, "layers": 12, "dense_width": 1536, "expert_width": 256, "heads": 8},
}
ROUNDS = {"smoke": 30, "100M": 12}
PERIODIC = ("router_every", "norms_every", "probe_every")
"""Periodic measurements of the defaults, by their keys in `log`."""
BARE = [
    "health.spike.action=none", "health.heartbeat_seconds=0", "health.violation_factor=0", "health.dead_steps=0",
]  # fmt: skip


def run(quick: bool) -> dict[str, Any]:
    """Measure every model; return the figures and the machine."""
    from benchmarks.data import corpus_of
    from benchmarks.step import machine

    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        corpus_of(folder / "text", np.full(2000, 300), vocabulary=8192)
        for name, model in MODELS.items():
            if quick and name != "smoke":
                continue
            rounds = 3 if quick else ROUNDS[name]
            print(f"{name}: {rounds} rounds of {2 + len(PERIODIC)} steps", file=sys.stderr)
            found[name] = _measure(folder, name, model, rounds)
    return {"on": machine(), "found": found}


def table(results: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [f"{results['on']}; 2048 tokens a step, fp32, one process", ""]
    head = (
        "| | parameters | bare step, s | every step, ms | routers, ms | norms, ms | probe, ms | overhead | checkpoint |"
    )
    lines += [f"{head} stall, s | waited for, s |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    for name, row in results["found"].items():
        extra = [f"{1e3 * row[kind]:.1f}" for kind in ("every step", *PERIODIC)]
        cells = [name, f"{row['parameters'] / 1e6:.0f}M", f"{row['bare']:.3f}", *extra, f"{row['overhead']:.2%}"]
        cells += [f"{row['bytes'] / 1e6:.0f} MB", f"{row['stall']:.3f}", f"{row['waited']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _measure(folder: Path, name: str, model: dict, rounds: int) -> dict[str, float]:
    configs = {kind: _config(folder, f"{name}-{kind}", model, words) for kind, words in (("bare", BARE), ("all", []))}
    first = configs["bare"]
    ranks = mesh.start(first.parallel, first.model, None, False)
    runs = {}
    try:
        for kind, config in configs.items():
            directory = RunDirectory(Path(config.run.dir))
            runs[kind] = Trainer(config, ranks, directory, Origin(CheckpointDirectory.at(directory.path))), directory
        seconds = _rounds(runs["bare"][0], runs["all"][0], rounds)
        return _shares(seconds, _checkpoints(runs["all"][0]))
    finally:
        for trainer, directory in runs.values():
            trainer.close()
            directory.release()
        mesh.stop()


def _rounds(bare: Trainer, full: Trainer, rounds: int) -> dict[str, list[float]]:
    """Seconds of each kind of step, one of each per round, after a round of warm-up."""
    seconds: dict[str, list[float]] = {kind: [] for kind in ("bare", "defaults", *PERIODIC)}
    for number in range(rounds + 1):
        for kind, times in seconds.items():
            trainer = bare if kind == "bare" else full
            for word in PERIODIC:
                setattr(trainer.config.log, word, int(word == kind))
            began = time.perf_counter()
            trainer.log(trainer.one_step())
            if number:
                times.append(time.perf_counter() - began)
    return seconds


def _shares(seconds: dict[str, list[float]], saved: dict[str, float]) -> dict[str, float]:
    """Median differences, and the total overhead at the periods of the defaults."""

    def extra(kind: str, base: str) -> float:
        return statistics.median(one - other for one, other in zip(seconds[kind], seconds[base]))

    bare = statistics.median(seconds["bare"])
    found = {"bare": bare, "every step": extra("defaults", "bare")}
    found |= {word: extra(word, "defaults") for word in PERIODIC}
    spent = found["every step"] + sum(found[word] / getattr(LogConfig(), word) for word in PERIODIC)
    return found | saved | {"overhead": (spent + saved["stall"] / CheckpointConfig().every) / bare}


def _checkpoints(trainer: Trainer) -> dict[str, float]:
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    stalls, waits = [], []
    for _ in range(3):
        trainer.step += 1
        stalls.append(trainer.save(wait=False))
        trainer.saver.wait()
        trainer.step += 1
        began = time.perf_counter()
        trainer.save(wait=True)
        waits.append(time.perf_counter() - began)
    newest = max((trainer.directory.path / "checkpoints").glob("step_*"))
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
