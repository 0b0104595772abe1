"""A run directory with every file that a report reads, written without training."""

import json
from pathlib import Path

import numpy as np
import yaml

LAYERS, EXPERTS, STEPS = 3, 4, 12
DENSE = 1
"""Layers of the smoke model before the first MoE layer."""
CHARTS = {
    "Loss": {
        "training": "loss",
        "validation held_out": "validation_loss.held_out",
        "average held_out": "validation_loss_average.held_out",
    },
    "Validation by bytes": {"held_out": "validation_bits_per_byte.held_out"},
    "Validation by context": {
        "1.held_out": "validation_loss_at.1.held_out",
        "2.held_out": "validation_loss_at.2.held_out",
    },
    "Forgetting": {"held_out": "forgetting.held_out"},
    "Other losses": {"z-loss": "z_loss", "sequence loss": "sequence_loss"},
    "Learning rates": {"Muon": "lr_muon", "AdamW": "lr_adamw"},
    "Gradient norm before clipping": {"norm": "grad_norm"},
    "Weight norms": {"experts": "weight_norm.experts", "head": "weight_norm.head"},
    "Update norms": {"experts": "update_norm.experts"},
    "Largest logits": {"head": "max_head_logit", "attention": "max_attention_logit"},
    "Throughput": {"tokens/s": "tokens_per_second"},
    "MFU": {"MFU": "mfu"},
    "Goodput": {"goodput": "goodput"},
    "Waiting": {"for data": "data_seconds", "for a checkpoint": "checkpoint_seconds"},
    "Straggler spread": {"spread": "rank_seconds_spread"},
    "Memory": {"peak": "memory_gib"},
    "BatchHet": {"BatchHet": "batch_het"},
    "Tokens by source": {"code": "source_tokens.code", "prose": "source_tokens.prose"},
    "Epochs by source": {"code": "epoch.code"},
    "MaxVio": {"worst layer": "max_violation", "mean of the layers": "max_violation_mean"},
    "Experts without a token": {"dead experts": "dead_experts"},
    "MaxVio in validation": {"held_out": "validation_max_violation.held_out"},
    "Experts without a token in validation": {"held_out": "validation_dead_experts.held_out"},
    "Starved experts": {"starved": "starved_experts"},
    "Router entropy": {"entropy": "router_entropy"},
    "Expert bias": {"range": "bias_range"},
}
"""Every chart: its curves and the fields that they show."""


def records(steps: int = STEPS) -> list[dict]:
    """Steps with every field that a chart shows, all values distinct."""
    fields = [field for curves in CHARTS.values() for field in curves.values()]
    rng = np.random.default_rng(0)
    steps_made = []
    for step in range(1, steps + 1):
        values = dict(zip(fields, rng.uniform(0.1, 1, len(fields)).tolist()))
        steps_made.append({"step": step, "tokens": 100 * step, **values, "skipped": step == 5, "attempt": 1})
    return steps_made


def entries() -> list[dict]:
    """Lines of router.jsonl."""
    rng = np.random.default_rng(1)
    lines = []
    for step in range(2, STEPS + 1, 2):
        load = rng.dirichlet(np.ones(EXPERTS), LAYERS)
        by_layer = {name: rng.random(LAYERS).tolist() for name in ("max_violation", "dead", "bias_range")}
        bias = rng.normal(size=(LAYERS, EXPERTS)).tolist()
        lines.append({"step": step, "tokens": 100 * step, "load": load.tolist(), **by_layer, "bias": bias})
    return lines


def event_lines() -> list[dict]:
    """Lines of events.jsonl."""
    events = [
        ("start", 0, "begun"), ("checkpoint", 4, "saved"), ("spike", 7, "far above"), ("rollback", 7, "back to 4"),
        ("resume", 4, "from 4"), ("collapse", 9, "layer 2"),
    ]  # fmt: skip
    time = "2026-01-02T03:04:05.678+00:00"
    return [{"time": time, "step": at, "kind": kind, "rank": 1, "message": text, "n": at} for kind, at, text in events]


def write_lines(path: Path, objects: list[dict], tail: str = "") -> None:
    """Write a JSON Lines file; `tail` is appended as it is."""
    path.write_text("".join(json.dumps(one) + "\n" for one in objects) + tail)


def full_run(folder: Path, name: str = "mine", rate: float = 0.02) -> Path:
    """Write a run directory with every file, without training."""
    folder.mkdir()
    settings = {
        "run": {"name": name, "dir": "x", "steps": STEPS},
        "optim": {"muon": {"lr": rate}},
        "model": {"name": "smoke"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "status.json").write_text(json.dumps({"state": "saved", "code": 75, "step": STEPS, "reason": "asked"}))
    write_lines(folder / "metrics.jsonl", records())
    write_lines(folder / "events.jsonl", event_lines())
    write_lines(folder / "router.jsonl", entries())
    return folder
