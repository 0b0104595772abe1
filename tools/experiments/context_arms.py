"""The arms of the experiment on context extension: train one, and measure it.

Shapes: B rows of a step, S tokens of a row, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from context_task import VOCABULARY, question_rows, training_rows

from trinity.checkpoint.checkpoint import Checkpoint
from trinity.checkpoint.directory import CheckpointDirectory
from trinity.checkpoint.load import load, model_state
from trinity.checkpoint.save import Saver
from trinity.config.load import OmegaConf, build_config
from trinity.config.run import CheckpointConfig, RunConfig
from trinity.data.stream.shuffle import random_key
from trinity.models.trinity import Trinity
from trinity.optim.build import Optimizers
from trinity.parallel import mesh
from trinity.training.build import build_model, make_optimizers
from trinity.training.train_step import train_step

ARMS = ("base", "extended", "control")
WARMUP_STEPS = 20
BATCH_TOKENS = 1 << 14
"""Most tokens of one forward pass while measuring."""


class Size(NamedTuple):
    """The sizes of an experiment.

    width, layers, heads, dense_width, window: of the model; every second layer is global.
    muon, adamw: peak learning rates. extension_rate: fraction of them in the arms after base.
    base_steps, extension_steps: optimizer steps of base, and of the other arms.
    short, long: tokens of a row. tokens: of a step.
    pairs, questions: of a training row.
    lengths, asked_pairs, samples: measured lengths, numbers of pairs, and rows of each.
    """

    width: int = 128
    layers: int = 4
    heads: int = 4
    dense_width: int = 384
    window: int = 32
    muon: float = 3e-3
    adamw: float = 9e-4
    extension_rate: float = 0.3
    base_steps: int = 900
    extension_steps: int = 120
    short: int = 128
    long: int = 512
    tokens: int = 4096
    pairs: int = 6
    questions: int = 24
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    asked_pairs: tuple[int, ...] = (4, 20)
    samples: int = 128


FULL = Size()
QUICK = Size(
    width=16, heads=2, dense_width=16, window=8, base_steps=4, extension_steps=2, short=32, long=64, tokens=128,
    pairs=3, questions=4, lengths=(32, 64), asked_pairs=(2, 4), samples=8,
)  # fmt: skip


def steps_of(size: Size) -> dict[str, int]:
    """Optimizer steps of each arm."""
    return {arm: size.base_steps if arm == "base" else size.extension_steps for arm in ARMS}


def arm_config(seed: int, size: Size) -> RunConfig:
    """Model and optimizers, which are those of all arms."""
    settings = {
        "run": {"seed": seed, "steps": size.base_steps, "threads": 1},
        "model": {
            "name": "smoke", "vocab_size": VOCABULARY, "width": size.width, "layers": size.layers,
            "dense_layers": size.layers, "dense_width": size.dense_width, "heads": size.heads, "kv_heads": size.heads,
            "head_dim": size.width // size.heads, "window": size.window, "global_every": 2,
            "max_positions": max(size.lengths),
        },
        "batch": {"sequences": size.tokens // size.short, "microbatch": size.tokens // size.short},
        "optim": {"muon": {"lr": size.muon, "dtype": "float32"}, "adamw": {"lr": size.adamw}},
        "balancing": {"kind": "none"},
        "precision": {"compute": "float32"},
    }  # fmt: skip
    return build_config([("the experiment", OmegaConf.create(settings))])


def train_arm(arm: str, seed: int, size: Size, folder: Path, after_step: Callable[[], Any]) -> dict[str, Any]:
    """Train one arm in this process, and measure it.

    Args:
        arm: one of ARMS; base saves its state, the others load it.
        folder: for the checkpoints of base.
        after_step: called after each optimizer step.
    Returns:
        "loss": mean over the answers, for each step; "scores": a list of the results of `measure`.
    """
    config = arm_config(seed, size)
    ranks = mesh.start(config.parallel, config.model, config.run.threads, config.run.deterministic)
    try:
        model = build_model(config, ranks)
        model.init_weights(seed)
        optimizers = make_optimizers(config, model)
        checkpoints = CheckpointDirectory(folder / f"base-{seed}", str(folder))
        if arm != "base":
            load(_state(model, optimizers), checkpoints.path_of(size.base_steps))
        length = size.long if arm == "extended" else size.short
        losses = []
        for step in range(steps_of(size)[arm]):
            random = np.random.default_rng(random_key(arm, str(seed), str(step)))
            batch = training_rows(random, size.tokens // length, length, size.pairs, size.questions)
            rate = min(1.0, (step + 1) / WARMUP_STEPS) if arm == "base" else size.extension_rate
            result = train_step(model, optimizers, batch, config, rate, ranks)
            assert result.skip_reason is None, f"step {step} is not finite"
            losses.append(float(f"{result.metrics['loss']:.5g}"))
            after_step()
        scores = [
            {"length": length, "pairs": pairs} | measure(model, length, pairs, seed, size.samples)
            for length in size.lengths
            for pairs in size.asked_pairs
        ]
        if arm == "base":
            _save(_state(model, optimizers), checkpoints, size.base_steps)
        return {"loss": losses, "scores": scores}
    finally:
        mesh.stop()


@torch.no_grad()
def measure(model: Trinity, length: int, pairs: int, seed: int, samples: int) -> dict[str, Any]:
    """Ask one question at the end of each of `samples` rows; the rows of a seed are the same for every arm.

    Returns:
        "score": share of answers with the largest logit; "nats": the answers' mean loss; "by_depth": the score in each
        quarter of the depth, null for a quarter without rows.
    """
    rows = question_rows(
        np.random.default_rng(random_key("measure", f"{seed}/{length}/{pairs}")), samples, length, pairs
    )
    right, nats = [], 0.0
    for tokens_BS, answers_B in zip(*(x.split(max(1, BATCH_TOKENS // length)) for x in rows[:2])):
        logits_BV = model(tokens_BS)[:, -1].float()
        right.append((logits_BV.argmax(dim=1) == answers_B).numpy())
        nats += torch.nn.functional.cross_entropy(logits_BV, answers_B, reduction="sum").item()
    right_B = np.concatenate(right)
    quarters = [right_B[np.minimum(3, 4 * rows.depths_B).astype(int) == quarter] for quarter in range(4)]
    by_depth = [float(part.mean()) if len(part) else None for part in quarters]
    return {"score": float(right_B.mean()), "nats": nats / samples, "by_depth": by_depth}


def _state(model: Trinity, optimizers: Optimizers) -> dict[str, torch.Tensor]:
    return model_state(model) | {f"optim.{key}": value for key, value in optimizers.state_dict().items()}


def _save(state: dict[str, torch.Tensor], checkpoints: CheckpointDirectory, step: int) -> None:
    """Save a checkpoint, which replaces one of an interrupted call."""
    saver = Saver(checkpoints, CheckpointConfig(asynchronous=False), note=lambda *_, **__: None)
    try:
        if Path(checkpoints.path_of(step)).exists():
            Checkpoint(checkpoints.path_of(step)).remove()
        saver.save(state, step)
    finally:
        saver.close()
