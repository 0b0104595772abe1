"""Results of the comparison of balancing rules: means over ranges of steps, tables, plot."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiment import Record, cost, records_of
from plots import COLOURS, markdown_table, median_and_range, save_plot

TITLES = {
    "smebu": "SMEBU",
    "sign": "sign",
    "none": "none",
    "no_clamp": "SMEBU without clamp",
    "no_momentum": "SMEBU without momentum",
}
RANGES = {"early": "early", "constant": "end of the constant rate", "decayed": "end of the decay"}
MEASURES = {
    "max_violation_mean": ("MaxVio", ".2f"),
    "step": ("step of the biases", ".2g"),
    "reversals": ("reversals, share of the experts", ".2f"),
    "dead_experts": ("share of dead experts", ".3f"),
}
TUNED = ("smebu", "sign")
SMOOTHED_STEPS = 10
SETTLED = 0.5


def mean_over(values: Sequence[float], steps: Sequence[int]) -> float:
    """The mean of a curve over the steps from `steps[0]` to before `steps[1]`."""
    return statistics.fmean(values[slice(*steps)])


def means(results: Record, arm: str, measure: str, when: str) -> list[float]:
    """A measure of an arm over a range of steps, for each seed."""
    steps = results["settings"]["size"][when]
    return [mean_over(record["curves"][measure], steps) for record in records_of(results, arm)]


def falls(results: Record, arm: str) -> list[float]:
    """The step of the biases at the end of the decay over the early one, for each seed."""
    early, late = (means(results, arm, "step", when) for when in ("early", "decayed"))
    return [after / before for before, after in zip(early, late)]


def report(results: Record) -> str:
    """Tables: the rates tried; every measure of every arm and range; losses."""
    size = results["settings"]["size"]
    tables = [markdown_table(["rule", "rate: MaxVio with seed 0"], [[TITLES[a], _tried(results, a)] for a in TUNED])]
    ranges = [f"{name}, {size[when][0]}–{size[when][1]}" for when, name in RANGES.items()]
    for measure, (title, digits) in MEASURES.items():
        rows = [
            [TITLES[arm], *(median_and_range(means(results, arm, measure, when), digits) for when in RANGES)]
            for arm in TITLES
        ]
        tables.append(markdown_table([f"{title}, mean over steps", *ranges], rows))
    rows = []
    for arm, title in TITLES.items():
        runs = records_of(results, arm)
        fall = "" if arm == "none" else median_and_range(falls(results, arm), ".2f")
        rows.append([title, f"{runs[0]['rate']:g}", fall, median_and_range([r["validation"] for r in runs], ".4f")])
    tables.append(markdown_table(["rule", "rate", "step at the end / early", "validation loss, nats"], rows))
    return "\n\n".join(tables)


def _tried(results: Record, arm: str) -> str:
    """The rates that were tried for an arm, each with its MaxVio."""
    size = results["settings"]["size"]
    found = {}
    for rate in size["rates"]:
        (run,) = records_of(results, f"{arm}_{rate:g}")
        found[rate] = mean_over(run["curves"]["max_violation_mean"], size["tuned"])
    return ", ".join(f"{rate:g}: {violation:.3f}" for rate, violation in found.items())


def outcome(results: Record) -> str:
    """What came out."""
    smebu, sign = (falls(results, arm) for arm in ("smebu", "sign"))
    if max(smebu) <= SETTLED:
        verdict = "This agrees with the claim."
    elif statistics.median(smebu) < statistics.median(sign):
        verdict = f"SMEBU's step falls, but not to {SETTLED} of the early one: this agrees in part with the claim."
    else:
        verdict = "This contradicts the claim."
    size = results["settings"]["size"]
    early, late = (
        {arm: median_and_range(means(results, arm, "max_violation_mean", when), ".2f") for arm in TITLES}
        for when in ("early", "decayed")
    )
    turned = {arm: median_and_range(means(results, arm, "reversals", "decayed"), ".2f") for arm in TUNED}
    constant = [c / e for e, c in zip(*(means(results, "smebu", "step", when) for when in ("early", "constant")))]
    edge = [TITLES[arm] for arm in TUNED if records_of(results, arm)[0]["rate"] == max(size["rates"])]
    tuned = f" The rate of {' and of '.join(edge)} is the largest that was tried." if edge else ""
    return (
        f"SMEBU's step falls to {median_and_range(constant, '.2f')} of the early one while the learning rate is "
        f"constant, and to {median_and_range(smebu, '.2f')} at the end of its decay; that of sign has a fixed size. "
        f"{verdict} At the end {turned['smebu']} of the biases turn back in a step with SMEBU, {turned['sign']} with "
        f"sign. MaxVio at the end: SMEBU {late['smebu']}, sign {late['sign']}, none {late['none']}, without momentum "
        f"{late['no_momentum']}. Without clamp, which the report found to balance fast and to break later: "
        f"{early['no_clamp']} in the early steps, against {early['smebu']} with it, and {late['no_clamp']} at the end. "
        f"{_losses(results)}{tuned} ({cost(results)})"
    )


def _losses(results: Record) -> str:
    """How the losses of the other rules differ from SMEBU's with the same seed."""
    smebu = [record["validation"] for record in records_of(results, "smebu")]
    differences = {
        title: [record["validation"] - own for record, own in zip(records_of(results, arm), smebu)]
        for arm, title in TITLES.items()
        if arm != "smebu"
    }
    clear = [title for title, values in differences.items() if min(values) > 0 or max(values) < 0]
    figures = ", ".join(f"{title} {median_and_range(values, '+.3f')}" for title, values in differences.items())
    which = f"differs in one direction for every seed with {', '.join(clear)}" if clear else "is no clear difference"
    return f"The validation loss minus SMEBU's, {statistics.median(smebu):.3f} nats, {which}: {figures}."


def draw(path: Path, results: Record) -> None:
    """Plot MaxVio, the step of the biases and reversals over the steps: means of all seeds, smoothed."""
    import numpy as np

    def paint(figure: Any) -> None:
        panels = figure.subplots(3, 1, sharex=True)
        for panel, measure in zip(panels, ("max_violation_mean", "step", "reversals")):
            for colour, (arm, title) in zip(COLOURS, TITLES.items()):
                if arm == "none" and measure != "max_violation_mean":
                    continue
                curve = np.mean([record["curves"][measure] for record in records_of(results, arm)], axis=0)
                width = min(SMOOTHED_STEPS, len(curve))
                smooth = np.convolve(curve, np.full(width, 1 / width), "valid")
                panel.plot(np.arange(len(smooth)) + width / 2, smooth, color=colour, label=title)
            panel.axvline(results["settings"]["size"]["decay_start"], color="black", linestyle=":", linewidth=1)
            panel.set_title(MEASURES[measure][0], loc="left", fontsize=11)
        panels[0].set_yscale("log")
        panels[1].set_yscale("log")
        panels[-1].set_xlabel(
            f"step (means over seeds and {SMOOTHED_STEPS} steps); dotted: the learning rate begins to fall"
        )
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", frameon=False, ncols=3)

    save_plot(path, (7.5, 8.0), paint)
