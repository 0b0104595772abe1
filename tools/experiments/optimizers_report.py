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
RATE_TICKS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
MARKERS = "os^"
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


def savings(results: Record) -> list[float]:
    """For each seed, AdamW's tokens over those with which Muon has the loss that AdamW ends with.

    0 where Muon does not end with a loss as low.
    """
    ratios = []
    for adamw in records_of(results, "adamw"):
        runs = muon_runs(results, adamw["seed"])
        tokens, losses = [run["tokens"] for run in runs], [final(run) for run in runs]
        ratios.append(adamw["tokens"] / amount_at(final(adamw), tokens, losses))
    return ratios


def final(run: Record) -> float:
    """The validation loss; ∞ of a run that diverged."""
    return math.inf if run["validation"] is None else run["validation"]


def relative_step_times(results: Record) -> list[float]:
    """CPU seconds of a step of Muon over those of AdamW, for each seed."""
    times = [record["step_times"] for record in records_of(results, "step_times")]
    return [of_seed["muon"] / of_seed["adamw"] for of_seed in times]


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio else "not reached"


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
            median_and_range([final(run) for run in runs], ".4f"),
        ])  # fmt: skip
    ratios = [
        ["tokens to the loss that AdamW ends with, AdamW's over Muon's", ", ".join(map(_ratio, savings(results)))],
        ["CPU time of a step, Muon's over AdamW's", ", ".join(map(_ratio, relative_step_times(results)))],
    ]
    return "\n\n".join([
        markdown_table(["arm", "rate: validation loss with seed 0, nats"], rates),
        markdown_table(["run", "tokens", "validation loss, nats"], lines),
        markdown_table(["", "each seed"], ratios),
    ])  # fmt: skip


def outcome(results: Record) -> str:
    """What came out."""
    ratios, slower = savings(results), statistics.median(relative_step_times(results))
    differences = [
        final(muon) - final(adamw) for muon, adamw in zip(records_of(results, "muon"), records_of(results, "adamw"))
    ]
    loss = statistics.median(final(run) for run in records_of(results, "adamw"))
    if min(ratios) > 1:
        goal = "meets" if statistics.median(ratios) >= GOAL else "misses"
        verdict = f"this agrees with the claim, and {goal} the goal of {GOAL}"
    elif max(ratios) <= 1:
        verdict = f"this contradicts the claim, and misses the goal of {GOAL}"
    else:
        verdict = f"this shows no clear difference, and misses the goal of {GOAL}"
    reached = [f"{ratio:.2f}" for ratio in ratios if ratio]
    missed = len(ratios) - len(reached)
    clauses = [f"AdamW needs {', '.join(reached)} times the tokens of Muon"] if reached else []
    if missed:
        clauses.append(f"in {missed} of {len(ratios)} seeds Muon does not reach AdamW's final loss")
    return (
        f"To the loss with which AdamW ends: {'; '.join(clauses)}: {verdict}. "
        f"After equal tokens Muon's validation loss minus AdamW's is {median_and_range(differences, '+.4f')} nats; "
        f"AdamW's is {loss:.3f}. "
        f"A step of Muon takes {slower:.2f} times the CPU time of one of AdamW. ({cost(results)})"
    )


def draw(path: Path, results: Record) -> None:
    """Plot the loss by rate with seed 0, and by tokens for all seeds."""

    def paint(figure: Any) -> None:
        by_rate, by_tokens = figure.subplots(1, 2)
        for colour, (arm, title) in zip(COLOURS, TITLES.items()):
            runs = tuning(results["parts"], arm)
            by_rate.plot([r["rate"] for r in runs], [r["validation"] for r in runs], "o-", color=colour, label=title)
        by_rate.set(xscale="log", xlabel="learning rate")
        low, high = by_rate.get_xlim()
        ticks = [tick for tick in RATE_TICKS if low < tick < high]
        by_rate.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        by_rate.minorticks_off()
        by_rate.set_title("Validation loss by rate, seed 0, nats", loc="left", fontsize=11)
        seeds = [run["seed"] for run in records_of(results, "adamw")]
        for seed in seeds:
            runs = muon_runs(results, seed)
            marker = MARKERS[seed % len(MARKERS)]
            by_tokens.plot(
                [r["tokens"] / 1e3 for r in runs], [r["validation"] for r in runs], f"{marker}-", color=COLOURS[0]
            )
        for run in records_of(results, "adamw"):
            colour, marker = COLOURS[list(TITLES).index(run["arm"])], MARKERS[run["seed"] % len(MARKERS)]
            by_tokens.plot(run["tokens"] / 1e3, run["validation"], marker, color=colour)
            by_tokens.axhline(run["validation"], color=colour, linestyle=":", linewidth=1)
        by_tokens.set(xlabel="thousand tokens of a run, each with its own decay")
        by_tokens.set_title("Validation loss by tokens, a marker for each seed", loc="left", fontsize=11)
        figure.legend(*by_rate.get_legend_handles_labels(), loc="outside upper left", frameon=False, ncols=3)

    save_plot(path, (9.5, 4.2), paint)
