"""Merge models: CPU seconds and memory of tools/merge.py, and of mergekit where it is installed.

The suite makes its own models: one of Mini's shape with 12,417 tiny tensors, three of 739M parameters in bf16 (4.5 GB
of disk in all, and the results), random numbers near a common base. Each merge is a process of its own on one thread:
its CPU seconds, and its largest anonymous memory, read from /proc while it runs. MERGEKIT_PYTHON names a Python with
mergekit 0.1.5; BENCH_FOLDER a folder with space, otherwise a temporary one is used.
"""

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from benchmarks.timing import record
from safetensors.torch import save_file

from trinity.config.hf_config import to_hf_config
from trinity.config.model import ModelConfig
from trinity.io.json_files import write_json
from trinity.io.local import make_folder, write_atomically
from trinity.merging.tensors import model_tensors

ROOT = Path(__file__).parents[2]
TINY = ModelConfig(
    vocab_size=256, width=8, layers=32, dense_layers=2, dense_width=16, heads=2, kv_heads=1, head_dim=8, experts=128,
    active_experts=8, expert_width=4,
)  # fmt: skip
LARGE = ModelConfig(
    vocab_size=100_352, width=1024, layers=16, dense_layers=2, dense_width=3072, heads=8, kv_heads=2, head_dim=128,
    experts=32, active_experts=4, expert_width=320,
)  # fmt: skip
RUNNER = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
recipe = MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1])))
run_merge(recipe, sys.argv[2], options=MergeOptions(quiet=True, write_model_card=False))
"""


def run(quick: bool) -> dict[str, Any]:
    """Measure; returns the figures and what they were measured on."""
    from benchmarks.step import machine

    results: dict[str, Any] = {"on": machine(), "merges": {}}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_FOLDER")) as scratch:
        folder = Path(scratch)
        sizes = {"tiny": TINY} if quick else {"tiny": TINY, "large": LARGE}
        for size, config in sizes.items():
            count = _make_models(folder / size, config)
            print(
                f"{size}: 3 models of {count:,} parameters, {len(list(model_tensors(config))):,} tensors",
                file=sys.stderr,
            )
            for method in ("linear", "ties"):
                recipe = _recipe(folder / size, method)
                for name, words in _contenders(folder, recipe).items():
                    figures = _measure(words)
                    results["merges"][f"{size}, {method}, {name}"] = figures
                    record(f"{size}, {method}, {name}", figures)
    return results


def table(results: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [results["on"], "", "| models, method, program | CPU s | s | anonymous memory |", "|---|---|---|---|"]
    for name, row in results["merges"].items():
        if "failed" in row:
            lines.append(f"| {name} | {row['failed']} | | |")
        else:
            lines.append(f"| {name} | {row['cpu']:.1f} | {row['seconds']:.1f} | {row['anonymous'] / 1e9:.2f} GB |")
    return "\n".join(lines)


def _contenders(folder: Path, recipe: Path) -> dict[str, list[str]]:
    ours = [sys.executable, str(ROOT / "tools/merge.py"), str(recipe), str(folder / "out"), "--overwrite"]
    found = {"trinity": ours}
    if python := os.environ.get("MERGEKIT_PYTHON"):
        write_atomically(folder / "runner.py", RUNNER)
        found["mergekit"] = [python, str(folder / "runner.py"), str(recipe), str(folder / "out.mergekit")]
    return found


def _make_models(folder: Path, config: ModelConfig) -> int:
    """Three models in bf16, the first the base of the others; returns the parameters of one."""
    raw = to_hf_config(config, bos_id=None, eos_id=None, pad_id=None, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    base: dict[str, torch.Tensor] = {}
    for name in ("base", "a", "b"):
        tensors = {}
        for described in model_tensors(config):
            dtype = torch.bfloat16 if described.kind == "matrix" else torch.float32
            noise = torch.randn(described.shape, generator=generator, dtype=torch.float32)
            origin = base.get(described.name)
            mixed = noise.mul_(0.02) if origin is None else noise.mul_(0.002).add_(origin)
            tensors[described.name] = mixed.to(dtype)
        make_folder(folder / name)
        write_json(folder / name / "config.json", raw)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        base = base or tensors
    return sum(tensor.numel() for tensor in base.values())


def _recipe(folder: Path, method: str) -> Path:
    entries: list[dict] = [{"model": str(folder / name), "parameters": {"weight": 1.0}} for name in ("base", "a", "b")]
    content: dict[str, Any] = {"merge_method": method, "models": entries, "dtype": "bfloat16"}
    if method == "ties":
        content["models"] = entries[1:]
        content |= {"base_model": str(folder / "base"), "parameters": {"density": 0.5}}
    path = folder / f"{method}.yaml"
    write_atomically(path, yaml.safe_dump(content))
    return path


def _measure(words: list[str]) -> dict[str, Any]:
    """CPU seconds, seconds and largest anonymous memory of a process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if "merge.py" not in words[1]:
        environment.pop("PYTHONPATH", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start, most = time.perf_counter(), 0
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        most = max(most, _anonymous(process.pid))
        time.sleep(0.02)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        assert process.stderr is not None
        return {"failed": " ".join(process.stderr.read().split())[-160:]}
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu": cpu, "seconds": time.perf_counter() - start, "anonymous": most}


def _anonymous(process: int) -> int:
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0
