"""Training in the comparison of adaptations: sizes, one run in this process, and the modules that a run trains."""

import math
from statistics import median
from typing import Any, NamedTuple

import trinity  # noqa: F401  # before torch, for the policy of its threads

# isort: split
import torch
from adapt_texts import GENERAL, MANUAL, NAMES, SEARCH, TEST, TRAIN
from experiment import Lab
from small_run import SmallRun

from trinity.config.load import OmegaConf, build_config
from trinity.config.run import RunConfig
from trinity.data.sources.shards import TokenSource
from trinity.data.stream.shuffle import random_key
from trinity.interop import export_hf, load_hf
from trinity.merging.open_source import open_source
from trinity.merging.validation import PackedText, RowSettings
from trinity.models.trinity import Trinity
from trinity.parallel import mesh
from trinity.planning.fake_rank import state_bytes
from trinity.spectrum.modules import Unit, find_modules, find_units
from trinity.spectrum.scan import scan
from trinity.spectrum.scores import Score
from trinity.spectrum.select import Kind, choose

SHARES = (25, 50)
"""Percent of the modules of each type that train."""
SCORES: dict[str, Kind] = {"mp": "mp", "script": "spectrum", "random": "mp"}
"""How modules are ranked → the score that decides whether gains are ranked; random ones are drawn as mp's would be."""


class Size(NamedTuple):
    """The sizes of an experiment.

    vocabulary … window: of the model, whose first layer is dense.
    row, rows: tokens of a row, and rows of a step.
    base_steps, steps: optimizer steps of the base, and of each continuation.
    muon, adamw: peak rates of the base. rate: fraction of them at the peak of a continuation.
    replay: share of general text in the tokens of a continuation.
    every: use every `every`-th part of the texts.
    test_rows, search_rows: most rows of each text on which models are compared, and on which merges are searched.
    line_trials, part_trials, trials: budget of a merge back by one α, by parts, and of the merge of the domains.
    dam_rows, dam_sequences: rows of each text, and those of a step.
    timed_steps: of each choice of modules.
    """

    vocabulary: int = 1024
    width: int = 64
    layers: int = 9
    dense_width: int = 192
    heads: int = 4
    experts: int = 8
    expert_width: int = 32
    window: int = 64
    row: int = 128
    rows: int = 12
    base_steps: int = 600
    steps: int = 80
    muon: float = 2e-2
    adamw: float = 6e-3
    rate: float = 0.25
    replay: float = 0.125
    every: int = 1
    test_rows: int = 160
    search_rows: int = 32
    line_trials: int = 24
    part_trials: int = 60
    trials: int = 200
    dam_rows: int = 800
    dam_sequences: int = 4
    timed_steps: int = 12


FULL = Size()
QUICK = Size(
    vocabulary=300, width=16, layers=3, dense_width=16, heads=2, experts=4, expert_width=8, window=8, row=16, rows=2,
    base_steps=2, steps=2, every=16, test_rows=2, search_rows=2, line_trials=3, part_trials=3, trials=3, dam_rows=4,
    dam_sequences=2, timed_steps=1,
)  # fmt: skip


def shards(lab: Lab, domain: str, split: str) -> str:
    """The folder of a text."""
    return str(lab.texts.shards[domain][split])


def run_config(lab: Lab, steps: int, mixture: dict[str, float], rate: float, only: list[str]) -> RunConfig:
    """The config of one run.

    Args:
        steps: optimizer steps.
        mixture: domain → share of the tokens.
        rate: fraction of the base's peak rates.
        only: names of what is trained; empty: everything.
    """
    size = lab.size
    settings = {
        "run": {"seed": lab.seed, "steps": steps, "threads": 1},
        "model": {
            "name": "smoke", "vocab_size": size.vocabulary, "width": size.width, "layers": size.layers,
            "dense_layers": 1, "dense_width": size.dense_width, "heads": size.heads, "kv_heads": size.heads // 2,
            "head_dim": size.width // size.heads, "window": size.window, "experts": size.experts,
            "active_experts": 2, "expert_width": size.expert_width, "max_positions": max(2048, size.row),
        },
        "data": {
            "train": {name: shards(lab, name, TRAIN) for name in mixture}, "mixture": mixture,
            "tokenizer": str(lab.texts.tokenizer), "sequence_length": size.row, "packing": "rsdb", "rsdb_size": 4,
            "streams": 8, "workers": 0,
        },
        "batch": {"sequences": size.rows, "microbatch": size.rows},
        "optim": {
            "muon": {"lr": rate * size.muon, "weight_decay": 0.01, "dtype": "float32"},
            "adamw": {"lr": rate * size.adamw, "weight_decay": 0.01},
            "schedule": {
                "warmup_steps": max(1, steps // 10) if rate < 1 else 20, "decay": "linear",
                "decay_start_steps": steps // 2, "final": 0.0,
            },
        },
        "balancing": {"kind": "smebu", "rate": 5e-3, "sequence_loss": 1e-4},
        "loss": {"z": 1e-6},
        "precision": {"compute": "float32"},
        "train": {"only": only},
    }  # fmt: skip
    return build_config([("the experiment", OmegaConf.create(settings))])


def begin(config: RunConfig, ranks: mesh.Ranks, start: str | None) -> SmallRun:
    """A run that continues the model in the folder `start` with a fresh optimizer; None: from random weights."""
    return SmallRun(config, ranks, None if start is None else lambda model: load_hf(start, into=model))


def take_step(run: SmallRun) -> float:
    """Take one optimizer step; returns its CPU seconds."""
    before = run.seconds
    result = run.step()
    assert result.skip_reason is None, f"step {run.steps} is not finite"
    return run.seconds - before


def train(config: RunConfig, lab: Lab, start: str | None, out: str | None) -> dict[str, Any]:
    """Train a model in this process and measure it.

    Args:
        config: from run_config.
        start: folder of the model to continue with a fresh optimizer; None: from random weights.
        out: folder to export the model to, in fp32; None: it is not kept.
    Returns:
        "losses": of the test texts; "steps"; "parameters" of the model, "trained" of them; "gradient_bytes" and
        "optimizer_bytes", counted on the run's own tensors.
    """
    ranks = mesh.start(config.parallel, config.model, config.run.threads, config.run.deterministic)
    try:
        run = begin(config, ranks, start)
        for _ in range(config.run.steps or 0):
            take_step(run)
        model, state = run.model, state_bytes(run.model, run.optimizers)
        if out is not None:
            export_hf(model, out, lab.texts.tokenizer, torch.float32, overwrite=True)
        return {
            "losses": measure(model, lab), "steps": config.run.steps,
            "parameters": sum(each.numel() for each in model.parameters()),
            "trained": sum(each.numel() for each in model.parameters() if each.requires_grad),
            "gradient_bytes": state["gradients"], "optimizer_bytes": state["Muon momentum"] + state["AdamW moments"],
        }  # fmt: skip
    finally:
        mesh.stop()


def base(lab: Lab) -> dict[str, Any]:
    """Train the base on general text."""
    return train(run_config(lab, lab.size.base_steps, {GENERAL: 1.0}, 1.0, []), lab, None, lab.path("base"))


def continued(lab: Lab, domain: str, replay: bool, only: list[str], keep: str | None = None) -> dict[str, Any]:
    """Continue the base on a domain.

    Args:
        replay: whether a share of the tokens is general text.
        only: names of what is trained; empty: everything.
        keep: name under which the model is kept.
    """
    share = lab.size.replay if replay else 0.0
    mixture = {domain: 1.0 - share} | ({GENERAL: share} if share else {})
    config = run_config(lab, lab.size.steps, mixture, lab.size.rate, only)
    return train(config, lab, lab.path("base"), None if keep is None else lab.path(keep))


def score_modules(lab: Lab) -> dict[str, Any]:
    """Choose the modules of the base that train, by both scores and at random.

    Returns:
        "chosen": how and percent, as mp25 → names for train.only.
    """
    source = open_source(lab.path("base"))
    modules = find_modules(source)
    units = find_units(source, modules)
    scores = scan(source, modules, None, "cpu", lab.folder / "scores.json", force=True)
    ranked = {"mp": scores, "script": scores, "random": random_scores(units, lab.seed)}
    return {
        "chosen": {
            f"{how}{share}": [unit.name for unit in choose(units, ranked[how], kind, share)]
            for how, kind in SCORES.items()
            for share in SHARES
        }
    }


def step_times(lab: Lab, chosen: dict[str, list[str]]) -> dict[str, Any]:
    """Time training steps of all choices of modules in turns, so that the machine's load is the same for each.

    Args:
        chosen: name → names for train.only.
    Returns:
        "step_seconds": name, and "all" for everything trained → median CPU seconds of a step; the first is left out.
    """
    choices = {"all": [], **chosen}
    mixture = {MANUAL: 1.0 - lab.size.replay, GENERAL: lab.size.replay}
    configs = {name: run_config(lab, lab.size.steps, mixture, lab.size.rate, only) for name, only in choices.items()}
    config = configs["all"]
    ranks = mesh.start(config.parallel, config.model, config.run.threads, config.run.deterministic)
    try:
        runs = {name: begin(config, ranks, lab.path("base")) for name, config in configs.items()}
        turns = [{name: take_step(run) for name, run in runs.items()} for _ in range(1 + lab.size.timed_steps)]
    finally:
        mesh.stop()
    return {"step_seconds": {name: median(turn[name] for turn in turns[1:]) for name in choices}}


def random_scores(units: list[Unit], seed: int) -> dict[str, Score]:
    """A random score for each unit, that of all its tensors: so the best share of a type is a random one."""
    drawn = {unit.name: random_key("random modules", seed, unit.name) / 2**64 for unit in units}
    return {tensor: Score(drawn[unit.name], drawn[unit.name], 0) for unit in units for tensor in unit.tensors()}


@torch.no_grad()
def measure(model: Trinity, lab: Lab) -> dict[str, float]:
    """Nats per byte on the first rows of each domain's test text."""
    settings = RowSettings(window=lab.size.row, rows=lab.size.test_rows)
    losses = {}
    for name in NAMES:
        text = PackedText(TokenSource(shards(lab, name, TEST)), lab.texts.tokenizer, lab.size.row, settings)
        losses[name] = text.measure(model)["bits_per_byte"] * math.log(2)
    return losses


def search_texts(lab: Lab, names: tuple[str, ...]) -> dict[str, str]:
    """Domain → the text on which merges are searched."""
    return {name: shards(lab, name, SEARCH) for name in names}
