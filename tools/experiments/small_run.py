"""One training run of an experiment, in this process: the smoke recipe with a small model, on the corpus of domains.

Shapes: B rows, S tokens of a row, M MoE layers, E experts.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trinity  # noqa: F401  # before torch, for the policy of its threads

# isort: split
import torch
from domains import Corpus, describe, make_corpus

from trinity.config.load import OmegaConf, build_config
from trinity.config.run import RunConfig
from trinity.data.sources.shards import TokenSource
from trinity.data.stream.validation import validation_sequences
from trinity.evaluation.validation_loss import evaluate
from trinity.models.trinity import Trinity
from trinity.monitor.attention_probe import probe_attention
from trinity.monitor.hooks import StepResult
from trinity.optim.build import Optimizers
from trinity.optim.lr_schedule import lr_fraction
from trinity.parallel import mesh
from trinity.training.build import build_model, make_optimizers
from trinity.training.build_data import open_stream
from trinity.training.train_step import train_step

SMOKE_RECIPE: dict[str, Any] = {
    "run": {"threads": 1},
    "model": {
        "name": "smoke", "vocab_size": 1024, "width": 64, "layers": 4, "dense_layers": 1, "dense_width": 192,
        "heads": 4, "kv_heads": 2, "head_dim": 16, "window": 64, "experts": 8, "active_experts": 2, "expert_width": 32,
    },
    "data": {"sequence_length": 128, "packing": "rsdb", "rsdb_size": 64, "streams": 16, "document_mask": True,
             "workers": 0},
    "batch": {"sequences": 16, "microbatch": 16},
    "optim": {
        "muon": {"lr": 2e-2, "weight_decay": 0.01, "dtype": "float32"},
        "adamw": {"lr": 6e-3, "weight_decay": 0.01},
        "schedule": {"warmup_steps": 20, "decay": "linear", "final": 0.0},
    },
    "balancing": {"kind": "smebu", "rate": 5e-3, "sequence_loss": 1e-4},
    "loss": {"z": 1e-6},
    "precision": {"compute": "float32"},
    "evaluation": {"sequences": 16},
}  # fmt: skip
"""configs/smoke.yaml at 0.4 million parameters, which a core trains at about 10,000 tokens/s."""

QUICK_MODEL = [
    "model.vocab_size=512", "model.width=16", "model.layers=2", "model.dense_width=16", "model.heads=2",
    "model.head_dim=8", "model.expert_width=8", "model.window=8", "data.sequence_length=16", "data.rsdb_size=4",
    "batch.sequences=4", "batch.microbatch=4", "evaluation.sequences=1", "optim.schedule.warmup_steps=1",
]  # fmt: skip
"""Settings of the toy size."""


def small_corpus(out: Path, vocabulary: int, every: int = 1) -> Corpus:
    """Python's standard library as 14 domains (domains.py), in a folder of its own for each vocabulary."""
    return make_corpus(out / f"corpus-{vocabulary}", vocabulary, every=every)


def describe_corpus(corpus: Corpus) -> dict[str, Any]:
    """What a results file says of the text."""
    return describe(corpus, SMOKE_RECIPE["data"]["sequence_length"])


def small_config(corpus: Corpus, seed: int, steps: int, *settings: dict[str, Any] | list[str]) -> RunConfig:
    """The config of one run. Domains are weighted by their tokens, so that each is read once an epoch.

    Args:
        steps: optimizer steps; the recipe decays the rates over the last 30 % of them.
        settings: of sections, as in a config file, or dotted words; later ones win.
    """
    of_run = {
        "run": {"seed": seed, "steps": steps},
        "data": {
            "train": {name: str(folder) for name, folder in corpus.train.items()},
            "validation": {name: str(folder) for name, folder in corpus.validation.items()},
            "mixture": {name: float(TokenSource(folder).tokens) for name, folder in corpus.train.items()},
            "tokenizer": str(corpus.tokenizer),
        },
        "optim": {"schedule": {"decay_start_steps": round(0.7 * steps)}},
    }
    parts = [SMOKE_RECIPE, of_run, *settings]
    return build_config([
        ("the experiment", OmegaConf.from_dotlist(part) if isinstance(part, list) else OmegaConf.create(part))
        for part in parts
    ])  # fmt: skip


class SmallRun:
    """A run, step by step; `small_run` makes one on a mesh of its own.

    Args:
        config: from small_config.
        ranks: the mesh of this process.
        variant: changes the initialised model, before its optimizers are made.
        optimizers: makes them from config and model.

    Attributes:
        steps: made so far.
        seconds: CPU seconds of these steps, without reading data.
    """

    def __init__(
        self, config: RunConfig, ranks: mesh.Ranks, variant: Callable[[Trinity], Any] | None = None,
        optimizers: Callable[[RunConfig, Trinity], Optimizers] = make_optimizers,
    ) -> None:  # fmt: skip
        self.config, self.ranks = config, ranks
        self.model = build_model(config, ranks)
        self.model.init_weights(config.run.seed)
        if variant is not None:
            variant(self.model)
        self.optimizers = optimizers(config, self.model)
        self.stream = open_stream(config, ranks.rank, ranks.data_ranks)
        self.steps, self.seconds = 0, 0.0

    def step(self) -> StepResult:
        """Take one optimizer step; a step that is not finite is skipped, as in a run."""
        self.batch = self.stream.take(self.config.batch.sequences)
        if not self.config.data.document_mask:
            self.batch.document_ids_BS = None
        rate = lr_fraction(self.config, self.steps, 0)
        began = time.process_time()
        result = train_step(self.model, self.optimizers, self.batch, self.config, rate, self.ranks)
        self.seconds += time.process_time() - began
        self.steps += 1
        return result

    def largest_attention_logit(self) -> float:
        """Of the first row of the last batch, sampled as in a run (trinity.monitor.attention_probe)."""
        batch = self.batch
        probe = probe_attention(self.model, batch.tokens_BS, batch.targets_BS, batch.document_ids_BS, self.ranks)
        return probe.max_logit

    def validation_loss(self) -> float:
        """Mean over the domains of the loss on text held out of them, nats a token."""
        data, losses = self.config.data, []
        for folder in data.validation.values():
            rows = validation_sequences(TokenSource(folder), data.sequence_length, self.config.evaluation.sequences)
            size = self.config.batch.microbatch
            losses.append(evaluate(self.model, rows, size, data.document_mask, None, self.ranks.device)["loss"])
        return math.fsum(losses) / len(losses)

    def save(self) -> dict[str, Any]:
        """Everything that the next steps depend on."""
        optimizers = {name: _local(value).clone() for name, value in self.optimizers.state_dict().items()}
        return {"model": self.state(), "optimizers": optimizers, "stream": self.stream.state(), "steps": self.steps}

    @torch.no_grad()
    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from what `save` returned; config and its schedule may be others."""
        self.load(saved["model"])
        for name, value in self.optimizers.state_dict().items():
            _local(value).copy_(saved["optimizers"][name])
        self.stream.restore(saved["stream"])
        self.steps = saved["steps"]

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of all weights and biases of the model."""
        return {name: _local(value).clone() for name, value in self.model.state_dict().items()}

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Copy what `state` returned into the model."""
        for name, value in self.model.state_dict().items():
            _local(value).copy_(state[name])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@contextmanager
def small_run(config: RunConfig, **words: Any) -> Iterator[SmallRun]:
    """A run on one process; the words are arguments of SmallRun."""
    ranks = mesh.start(config.parallel, config.model, config.run.threads, config.run.deterministic)
    try:
        yield SmallRun(config, ranks, **words)
    finally:
        mesh.stop()


def rounded(values: list[float]) -> list[float | None]:
    """A curve for a results file: five digits, null for what is not finite."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]
