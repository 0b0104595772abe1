"""A short training run of configs/smoke.yaml by launch/pretrain.py, and the same without Triton for its first steps.

Both start from the same weights and read the same batches; in bf16 their losses differ by rounding, far below half a
per cent, unless a kernel is wrong.
"""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from benchmarks.timing import record, time_left

from trinity.io.json_files import to_json
from trinity.io.local import write_atomically

ROOT = Path(__file__).parents[2]
SOURCES, SETS = ("code", "prose"), ("train", "validation")
VOCABULARY, TOY_VOCABULARY = 8192, 400

COMPARED = 5
"""Steps whose losses are compared."""

AGREES = 5e-3
"""Largest relative difference of two losses in bf16."""


def data(toy: bool = False) -> None:
    """Prepare tokenizer and shards in the check's temporary folder, unless DATA names a folder that has them.

    Args:
        toy: a few files of this repository in place of the corpus of tools/prepare_corpus.py.
    """
    if os.environ.get("DATA"):
        record("data", {"skipped": "ready in the folder DATA"})
        return
    from trinity.data.prepare.corpus import write_corpus
    from trinity.data.prepare.prepare import prepare_data
    from trinity.data.tokenizer.train import train_from_files

    folder = data_folder()
    corpus = folder / "corpus"
    if toy:
        _toy_corpus(corpus)
    else:
        write_corpus(corpus)
    texts = [corpus / f"{source}.train.jsonl" for source in SOURCES]
    train_from_files(texts, TOY_VOCABULARY if toy else VOCABULARY, folder / "tokenizer")
    for source in SOURCES:
        for name in SETS:
            out = folder / "shards" / source / name
            workers = 0 if toy else os.cpu_count() or 1
            index, _ = prepare_data([corpus / f"{source}.{name}.jsonl"], folder / "tokenizer", out, workers=workers)
            record(f"{source}, {name}", {"tokens": index["tokens"], "documents": index["documents"]})


def data_folder() -> Path:
    """Folder with tokenizer and shards, as `make data` lays them out."""
    return Path(os.environ.get("DATA") or Path(os.environ["CHECK_SCRATCH"]) / "data").resolve()


def train(steps: int, toy: bool = False, without_triton: bool = False) -> int:
    """Train; record loss and speed, and the difference from the other run's losses. Returns 1 if they differ.

    Args:
        without_triton: replace every Triton kernel by its reference.
    """
    name = os.environ["BENCH_PART"]
    run = Path(os.environ["CHECK_SCRATCH"]) / name
    words = [*settings(steps, toy), f"run.dir={run}", *(references() if without_triton else ())]
    words += ["evaluation.every=0"] if without_triton else []
    command = [sys.executable, "launch/pretrain.py", "configs/smoke.yaml", *words]
    limit = max(1.0, min(time_left(), 3600))
    try:
        code = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        code = 124
    rows = metrics(run / "metrics.jsonl")
    write_atomically(Path(os.environ["CHECK_LOGS"]) / f"{name}.metrics.jsonl", (to_json(row) + "\n" for row in rows))
    record("run", summary(rows) | {"code": code} | ({"failed": f"exit code {code}"} if code else {}))
    if not without_triton:
        return int(code != 0)
    found = compare(metrics(Path(os.environ["CHECK_SCRATCH"]) / "smoke" / "metrics.jsonl"), rows)
    record("first losses, auto against reference", found)
    return int(code != 0 or "failed" in found)


def settings(steps: int, toy: bool) -> list[str]:
    """Words of the command line for the check's data and this device."""
    folder = data_folder()
    words = [f"data.tokenizer={folder / 'tokenizer'}", f"run.steps={steps}"]
    words += [f"data.{name}.{source}={folder / 'shards' / source / name}" for name in SETS for source in SOURCES]
    words += [f"precision.compute={'bfloat16' if torch.cuda.is_available() else 'float32'}"]
    words += ["optim.schedule.decay_start_steps=50"]
    return [*words, "model.layers=2", "evaluation.every=0"] if toy else words


def references() -> list[str]:
    """Settings that replace every Triton kernel by its reference."""
    from trinity.config.run import KernelsConfig

    return [f"kernels.{field.name}=reference" for field in fields(KernelsConfig) if "triton" in str(field.type)]


def metrics(path: Path) -> list[dict[str, Any]]:
    """The steps that a run has logged; none if it did not start."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """First and last loss, and the speed of the middle step, which no start-up or evaluation slows."""
    if not rows:
        return {"steps": 0}
    speeds = sorted(row["tokens_per_second"] for row in rows if row.get("tokens_per_second"))
    return {
        "steps": len(rows), "first_loss": rows[0]["loss"], "last_loss": rows[-1]["loss"],
        "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
    }  # fmt: skip


def compare(auto: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, Any]:
    """Losses of the first steps side by side; "failed" if they differ by more than AGREES, or if there are none."""
    pairs = [(a["loss"], r["loss"]) for a, r in zip(auto[:COMPARED], reference)]
    differences = [a / r - 1 for a, r in pairs]
    found: dict[str, Any] = {"pairs": pairs, "differences": differences}
    if not pairs:
        return found | {"failed": "one of the two runs has no step"}
    if not all(abs(difference) <= AGREES for difference in differences):
        return found | {"failed": f"the losses differ by up to {max(map(abs, differences)):.1e}"}
    return found


def _toy_corpus(folder: Path) -> None:
    """Paragraphs of some of this repository's files."""
    folder.mkdir(parents=True)
    code, prose = sorted((ROOT / "trinity" / "models").glob("*.py")), sorted((ROOT / "docs").glob("*.md"))
    files = {"code.train": code[2:], "code.validation": code[:2]}
    files |= {"prose.train": prose[2:8], "prose.validation": prose[:2]}
    for name, paths in files.items():
        parts = [part for path in paths for part in path.read_text(encoding="utf-8").split("\n\n")]
        write_atomically(folder / f"{name}.jsonl", (to_json({"text": part}) + "\n" for part in parts))
