"""A real corpus of a few kilobytes with its tokenizer, made once, and runs of a model that takes 20 ms a step."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import trinity  # noqa: F401  # before torch, for the policy of its threads

# isort: split
import torch
import yaml

from tests.forked_program import Program
from tests.starts_processes import starts_processes
from trinity.data.prepare.prepare import prepare_data
from trinity.data.tokenizer.train import train_from_files

ROOT = Path(__file__).parents[1]

# Before anything imports Triton: without a GPU its kernels run interpreted. `auto` picks none of them all the same.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell's background ignores Ctrl-C, and so would each program that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start processes: `make quick` leaves them out."""
    for item in items:
        if isinstance(item, pytest.Function) and starts_processes(item):
            item.add_marker("processes")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Small sources of real text and their tokenizer."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def make_corpus(folder: Path) -> SimpleNamespace:
    """Two sources of this project's own text, by the paragraph, a held-out one, their shards, and a tokenizer."""
    code = sorted((ROOT / "trinity").rglob("*.py"))
    prose = sorted((ROOT / "trinity").rglob("*.md"))
    train_from_files(code, 400, folder / "tokenizer")
    texts = {}
    for name, files in {"code": code[3:], "prose": prose, "held_out": code[:3]}.items():
        texts[name] = folder / f"{name}.jsonl"
        parts = [part for path in files for part in path.read_text().split("\n\n")]
        texts[name].write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
        prepare_data([texts[name]], folder / "tokenizer", folder / name)
    return SimpleNamespace(folder=folder, tokenizer=folder / "tokenizer", texts=texts)


@pytest.fixture(scope="session")
def recipe(corpus: SimpleNamespace) -> Callable[[Path], dict]:
    """recipe(folder) is the settings of a run there, with everything switched on."""
    return partial(everything_on, corpus)


@pytest.fixture
def settings(corpus: SimpleNamespace, tmp_path: Path) -> dict:
    """Settings of a run of its own for each test."""
    return everything_on(corpus, tmp_path / "run")


def everything_on(corpus: SimpleNamespace, run: Path) -> dict:
    """A config with everything switched on: RSDB, phases, mask, losses, SMEBU, clipping that bites, microbatches."""
    folder = corpus.folder
    return {
        "run": {"name": "tiny", "dir": str(run), "steps": 8, "seed": 3, "threads": 1},
        "model": {
            "name": "smoke", "vocab_size": 512, "width": 32, "layers": 3, "dense_layers": 1, "dense_width": 48,
            "heads": 4, "kv_heads": 2, "head_dim": 8, "window": 9, "global_every": 3, "experts": 8, "active_experts": 2,
            "expert_width": 16,
        },
        "data": {
            "train": {"code": str(folder / "code"), "prose": str(folder / "prose")},
            "validation": {"held_out": str(folder / "held_out")},
            "tokenizer": str(corpus.tokenizer), "mixture": {"code": 2, "prose": 1}, "sequence_length": 24,
            "document_mask": True, "loss_on_document_start": False, "streams": 12, "packing": "rsdb", "rsdb_size": 2,
            "phases": [{"tokens": 800, "mixture": {"prose": 2, "code": 1}, "packing": "sequential"}],
        },
        "batch": {"sequences": 6, "microbatch": 6, "ramp": [{"tokens": 500, "sequences": 12}]},
        "optim": {
            "muon": {"lr": 0.02, "dtype": "float32"}, "adamw": {"lr": 0.01},
            "schedule": {"warmup_steps": 2, "decay": "cosine", "decay_start_steps": 5, "decay_steps": 3, "final": 0.1},
            "clip_norm": 0.5,
        },
        "balancing": {"kind": "smebu", "rate": 0.01, "sequence_loss": 0.01},
        "loss": {"z": 1e-4},
        "precision": {"compute": "float32"},
        "checkpoint": {"every": 3},
        "evaluation": {"every": 4, "sequences": 5},
    }  # fmt: skip


@pytest.fixture(scope="session")
def uninterrupted(corpus: SimpleNamespace, fresh_command: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a run with these settings, started as a user would and never disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "config.yaml").write_text(yaml.safe_dump(everything_on(corpus, folder / "run")))
    process = fresh_command("launch/pretrain.py", folder / "config.yaml")
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    return folder / "run"


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[[dict], Path]:
    """A function that writes settings into a YAML file."""

    def write(settings: dict) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


@pytest.fixture(scope="session")
def command() -> Callable[..., Program]:
    """Start one of the project's programs in a process forked from a server with its imports done."""
    return lambda script, *words: Program(ROOT / script, list(map(str, words)))


@pytest.fixture(scope="session")
def run_command(command: Callable[..., Program]) -> Callable[..., SimpleNamespace]:
    """Run one of the project's programs to its end: code, output, errors."""

    def run(script: str, *words: object) -> SimpleNamespace:
        process = command(script, *words)
        output, errors = process.communicate(timeout=300)
        return SimpleNamespace(code=process.returncode, output=output, errors=errors)

    return run


@pytest.fixture(scope="session")
def fresh_command() -> Callable[..., subprocess.Popen]:
    """Start one of the project's programs in a new Python, as a user would, imports included; returns the process."""

    def start(script: str, *words: object, **options: object) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, str(ROOT / script), *map(str, words)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **options,
        )  # fmt: skip

    return start
