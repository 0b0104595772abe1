"""Loss spikes in the recorded runs of a whole recipe, by the rule and the defaults of health.spike."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from plots import markdown_table
from rsdb_arms import ARMS

from trinity.config.run import SpikeConfig
from trinity.io.json_files import read_json
from trinity.monitor.loss_spikes import SpikeDetector

RESULTS = Path(__file__).parent / "results"
COMMANDS = {"scaling_fifth": "scaling.py --fifth"}
"""Command of an experiment whose name is not that of its file."""
Curve = Sequence[float | None]


class Recorded(NamedTuple):
    """A run: its group in the table, the loss of each step, and the gradient norm, if it is recorded."""

    group: str
    loss: Curve
    grad_norm: Curve | None


class Spike(NamedTuple):
    """A spike: its step, from 0, and whether it is in the loss; else it is in the gradient norm alone."""

    step: int
    in_loss: bool


def find_spikes(loss: Curve, grad_norm: Curve | None = None, window: int | None = None) -> list[Spike]:
    """The steps that health.spike calls a spike; null is a step that was not finite, and no spike.

    Args:
        window: health.spike.window; None: its default, or half of the steps of a shorter run.
    """
    rule = SpikeConfig()
    detector = SpikeDetector(window or max(2, min(rule.window, len(loss) // 2)), rule.sigma)
    found = []
    for step, (value, norm) in enumerate(zip(loss, [1.0] * len(loss) if grad_norm is None else grad_norm)):
        spike = None if value is None or norm is None else detector.detect(value, norm)
        if spike is not None:
            found.append(Spike(step, spike.startswith("loss")))
    return found


def deviations_above(curve: Curve, step: int) -> float:
    """How many standard deviations a value stands above the mean of the last health.spike.window steps before it."""
    past = [value for value in curve[max(0, step - SpikeConfig().window) : step] if value is not None]
    value, mean = curve[step], math.fsum(past) / len(past)
    assert value is not None
    return (value - mean) / math.sqrt(math.fsum((x - mean) ** 2 for x in past) / len(past))


def recorded_runs() -> Iterator[Recorded]:
    """Every recorded run of a whole recipe."""
    for path in sorted((RESULTS / "runs").glob("*.json")):
        run = read_json(path, "make it again by record_run.py")
        yield Recorded(f"`{run['config']}`", run["loss"], run["grad_norm"])
    for name in ("ablations", "averaging", "balancing_rules", "optimizers", "rsdb", "scaling", "scaling_fifth"):
        results = read_json(RESULTS / f"{name}.json", "restore it")
        for record in [] if results is None else results.get("parts", results.get("runs")):
            curves = record.get("curves", record)
            part = record.get("part", "")
            whole = {
                "ablations": part.startswith("full_"), "balancing_rules": part == "smebu",
                "optimizers": part == "muon" or "%" in part,
            }  # fmt: skip
            if whole.get(name, True):
                arm = f", {ARMS[record['arm']].title}" if name == "rsdb" else ""
                yield Recorded(f"`{COMMANDS.get(name, f'{name}.py')}`{arm}", curves["loss"], curves.get("grad_norm"))


def spike_table() -> str:
    """A line for each config or experiment: runs, steps, spikes."""
    groups: dict[str, list[Recorded]] = {}
    for run in recorded_runs():
        groups.setdefault(run.group, []).append(run)
    rows = []
    for group, runs in groups.items():
        what = "loss, gradient norm" if all(run.grad_norm is not None for run in runs) else "loss"
        found = [spike for run in runs for spike in find_spikes(run.loss, run.grad_norm)]
        in_loss = sum(spike.in_loss for spike in found)
        steps = sum(len(run.loss) for run in runs)
        rows.append([group, str(len(runs)), f"{steps:,}", what, str(len(found)), str(in_loss)])
    return markdown_table(["config or experiment", "runs", "steps", "searched", "spikes", "of these in the loss"], rows)
