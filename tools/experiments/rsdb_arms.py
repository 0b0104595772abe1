"""The arms of the RSDB experiment: one small model, trained on the same documents with three kinds of packing.

Shapes: B rows of a step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import trinity  # noqa: F401  # before torch, for the policy of its threads

# isort: split
import torch
from domains import Corpus

from trinity.config.load import OmegaConf, build_config
from trinity.config.run import RunConfig
from trinity.data.sources.shards import TokenSource
from trinity.data.stream.collate import Batch
from trinity.data.stream.stream import SequenceStream
from trinity.data.stream.validation import validation_sequences
from trinity.evaluation.validation_loss import evaluate
from trinity.models.trinity import Trinity
from trinity.optim.lr_schedule import lr_fraction
from trinity.parallel import mesh
from trinity.training.build import build_model, make_optimizers
from trinity.training.build_data import open_stream
from trinity.training.train_step import train_step

CURVES = ("loss", "batch_het", "grad_norm")


class Arm(NamedTuple):
    """One arm: its title, and its values of data.packing and data.streams."""

    title: str
    packing: str
    streams: int


ARMS = {
    "sequential": Arm("sequential, 4 streams", "sequential", 4),
    "rsdb": Arm("RSDB, 4 streams", "rsdb", 4),
    "sequential_48": Arm("sequential, 48 streams", "sequential", 48),
}

# The smoke recipe (configs/smoke.yaml) at 1.4M parameters. The learning rate is constant after the warm-up, so that
# decay does not affect the measures over the last half of the run.
SETTINGS = {
    "run": {"threads": 1},
    "model": {
        "name": "smoke", "vocab_size": 4096, "width": 96, "layers": 4, "dense_layers": 1, "dense_width": 256,
        "heads": 4, "kv_heads": 2, "head_dim": 24, "window": 64, "experts": 8, "active_experts": 2, "expert_width": 48,
    },
    "data": {"sequence_length": 128, "rsdb_size": 64, "document_mask": True, "workers": 0},
    "batch": {"sequences": 16, "microbatch": 16},
    "optim": {
        "muon": {"lr": 2e-2, "weight_decay": 0.01, "dtype": "float32"},
        "adamw": {"lr": 6e-3, "weight_decay": 0.01},
        "schedule": {"warmup_steps": 20, "decay": "none"},
    },
    "balancing": {"kind": "smebu", "rate": 5e-3, "sequence_loss": 1e-4},
    "loss": {"z": 1e-6},
    "precision": {"compute": "float32"},
    "evaluation": {"sequences": 32},
    "log": {"het_sequences": 4},
}  # fmt: skip

QUICK = [
    "model.vocab_size=512", "model.width=32", "model.dense_width=48", "model.head_dim=8", "model.expert_width=16",
    "data.sequence_length=32", "data.rsdb_size=4", "evaluation.sequences=2",
]  # fmt: skip
"""Settings of the toy size."""


def arm_config(arm: Arm, corpus: Corpus, seed: int, steps: int, words: list[str]) -> RunConfig:
    """The config of one run. Domains are weighted by their tokens, so that each is read once an epoch."""
    data = {
        "train": {name: str(folder) for name, folder in corpus.train.items()},
        "validation": {name: str(folder) for name, folder in corpus.validation.items()},
        "mixture": {name: float(TokenSource(folder).tokens) for name, folder in corpus.train.items()},
        "tokenizer": str(corpus.tokenizer),
        "packing": arm.packing,
        "streams": arm.streams,
    }
    of_run = {"run": {"seed": seed, "steps": steps}, "data": data}
    parts = (OmegaConf.create(SETTINGS), OmegaConf.create(of_run), OmegaConf.from_dotlist(words))
    return build_config([("the experiment", part) for part in parts])


def train_arm(config: RunConfig, after_step: Callable[[], Any]) -> dict[str, Any]:
    """Train a run from scratch in this process.

    Args:
        config: from arm_config.
        after_step: called after each optimizer step.
    Returns:
        "curves": name → one value for each step, for each of CURVES; "validation": domain → final loss, nats a token.
    """
    ranks = mesh.start(config.parallel, config.model, config.run.threads, config.run.deterministic)
    try:
        model = build_model(config, ranks)
        model.init_weights(config.run.seed)
        optimizers = make_optimizers(config, model)
        stream = open_stream(config, ranks.rank, ranks.data_ranks)
        curves: dict[str, list[float]] = {name: [] for name in CURVES}
        for step in range(config.run.steps):
            plan = stream.plan.at(step)
            batch = take_by_stream(stream, config.batch.sequences)
            result = train_step(model, optimizers, batch, config, lr_fraction(config, step, plan.tokens), ranks)
            assert result.skip_reason is None, f"step {step} is not finite"
            for name, values in curves.items():
                values.append(result.metrics[name])
            after_step()
        return {"curves": curves, "validation": _validate(model, config, ranks)}
    finally:
        mesh.stop()


def take_by_stream(stream: SequenceStream, rows: int) -> Batch:
    """The next B rows, ordered by stream, so that BatchHet's groups of consecutive rows are one worker's microbatches.

    The loss and its gradient do not depend on the order of rows.
    """
    streams_B = np.arange(stream.k, stream.k + rows) % stream.streams
    order_B = torch.from_numpy(np.argsort(streams_B, kind="stable"))
    batch = stream.take(rows)
    return Batch(batch.tokens_BS[order_B], batch.targets_BS[order_B], batch.document_ids_BS[order_B])


def _validate(model: Trinity, config: RunConfig, ranks: mesh.Ranks) -> dict[str, float]:
    losses = {}
    for name, folder in config.data.validation.items():
        rows = validation_sequences(TokenSource(folder), config.data.sequence_length, config.evaluation.sequences)
        result = evaluate(model, rows, config.batch.microbatch, config.data.document_mask, None, ranks.device)
        losses[name] = result["loss"]
    return losses
