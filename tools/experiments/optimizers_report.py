"""Results of the comparison of Muon with AdamW: tokens and seconds to AdamW's loss, tables, plot."""

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiment import Record, cost, records_of
from plots import COLOURS, markdown_table, median_and_range, save_plot

GOAL = 1.3
TITLES = {
    "muon": "Muon",
    "adamw": "AdamW, a rate for the hidden matrices",
    "one_rate": "AdamW, one rate for everything",
}


def tuning(records: Iterable[Record], arm: str) -> list[Record]:
    """The runs with seed 0 by which an arm was tuned, by rate."""
    runs = [r for r in records if r["part"].startswith(f"{arm}_") and r.get("arm") == arm and "%" not in r["part"]]
    return sorted(runs, key=lambda run: run["rate"])


def muon_runs(results: Record, seed: int) -> list[Record]:
    """Muon's runs of a seed at its best rate, from the shortest to the whole one."""
    runs = [r for r in results["parts"] if r["seed"] == seed and (r["part"] == "muon" or "%" in r["part"])]
    return sorted(runs, key=lambda run: run["tokens"])


def amount_at(loss: float, amounts: Sequence[float], losses: Sequence[float]) -> float:
    """The amount of tokens or seconds at which a loss is reached: linear in the logarithm of the amount.

    Args:
        amounts: rising.
        losses: after each amount.
    Returns:
        the smallest amount if its loss is already as low: then the true one may be smaller; ∞ if no loss is as low.
    """
    if losses[0] <= loss:
        return amounts[0]
    for (low, before), (high, after) in pairwise(zip(amounts, losses)):
        if after <= loss:
            share = (before - loss) / (before - after)
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return math.inf


def savings(results: Record, unit: str) -> list[float]:
    """For each seed, AdamW's tokens (or step_seconds) over those with which Muon has the loss that AdamW ends with."""
    ratios = []
    for adamw in records_of(results, "adamw"):
        runs = muon_runs(results, adamw["seed"])
        amounts, losses = [run[unit] for run in runs], [run["validation"] for run in runs]
        ratios.append(adamw[unit] / amount_at(adamw["validation"], amounts, losses))
    return ratios


def report(results: Record) -> str:
    """Tables: the rates tried, and the loss by tokens."""
    rates = [
        [TITLES[arm], ", ".join(f"{run['rate']:g}: {run['validation']:.4f}" for run in tuning(results["parts"], arm))]
        for arm in TITLES
    ]
    lines = []
    for part in ("adamw", *(f"muon_{share:.0%}" for share in results["settings"]["size"]["shares"]), "muon"):
        runs = records_of(results, part)
        lines.append([
            f"{TITLES[runs[0]['arm']]}, rate {runs[0]['rate']:g}", f"{runs[0]['tokens']:,}",
            median_and_range([run["validation"] for run in runs], ".4f"),
            median_and_range([run["step_seconds"] for run in runs], ".1f"),
        ])  # fmt: skip
    ratios = [
        ["tokens", median_and_range(savings(results, "tokens"), ".2f")],
        ["CPU seconds", median_and_range(savings(results, "step_seconds"), ".2f")],
    ]
    return "\n\n".join([
        markdown_table(["arm", "rate: validation loss with seed 0, nats"], rates),
        markdown_table(["run", "tokens", "validation loss, nats", "CPU seconds of its steps"], lines),
        markdown_table(["to the loss that AdamW ends with", "AdamW's over Muon's"], ratios),
    ])  # fmt: skip


def outcome(results: Record) -> str:
    """What came out."""
    tokens, seconds = (savings(results, unit) for unit in ("tokens", "step_seconds"))
    losses = {arm: statistics.median(r["validation"] for r in records_of(results, arm)) for arm in ("adamw", "muon")}
    middle = statistics.median(tokens)
    if middle >= GOAL:
        verdict = f"This agrees with the claim, and meets the goal of {GOAL}."
    elif middle > 1:
        verdict = f"This agrees with the claim in kind, and misses the goal of {GOAL}."
    else:
        verdict = "This contradicts the claim."
    return (
        f"Muon reaches the loss that AdamW ends with after {median_and_range(tokens, '.2f')} times fewer tokens and "
        f"{median_and_range(seconds, '.2f')} times less CPU time; after equal tokens the validation loss is "
        f"{losses['muon']:.3f} with Muon and {losses['adamw']:.3f} nats with AdamW. {verdict} ({cost(results)})"
    )


def draw(path: Path, results: Record) -> None:
    """Plot the loss by rate with seed 0, and by tokens for all seeds."""

    def paint(figure: Any) -> None:
        by_rate, by_tokens = figure.subplots(1, 2)
        for colour, (arm, title) in zip(COLOURS, TITLES.items()):
            runs = tuning(results["parts"], arm)
            by_rate.plot([r["rate"] for r in runs], [r["validation"] for r in runs], "o-", color=colour, label=title)
        by_rate.set(xscale="log", xlabel="learning rate")
        by_rate.set_title("Validation loss by rate, seed 0, nats", loc="left", fontsize=11)
        seeds = [run["seed"] for run in records_of(results, "adamw")]
        for seed in seeds:
            runs = muon_runs(results, seed)
            by_tokens.plot([r["tokens"] for r in runs], [r["validation"] for r in runs], "o-", color=COLOURS[0])
        for run in records_of(results, "adamw"):
            by_tokens.plot(run["tokens"], run["validation"], "s", color=COLOURS[1])
            by_tokens.axhline(run["validation"], color=COLOURS[1], linestyle=":", linewidth=1)
        by_tokens.set(xlabel="tokens of a run, each with its own decay")
        by_tokens.set_title("Validation loss by tokens, all seeds", loc="left", fontsize=11)
        figure.legend(*by_rate.get_legend_handles_labels(), loc="outside upper left", frameon=False, ncols=3)

    save_plot(path, (9.5, 4.2), paint)
