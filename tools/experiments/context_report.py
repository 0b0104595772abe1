"""Results of the experiment on context extension: a table, and a plot of score and loss over the length of the row."""

import statistics
from pathlib import Path
from typing import Any

from plots import markdown_table, median_and_range, save_plot

KEPT = 0.95
"""A score that counts as kept: the report has 0.976 at twice the length on which Large was trained."""
COLOURS = {"base": "#7a7a7a", "extended": "#1f5fbf", "control": "#d95f02"}


def titles(results: dict[str, Any]) -> dict[str, str]:
    """Arm → its title."""
    size = results["settings"]
    extension = f"+ {size['extension_steps']} steps at"
    return {
        "base": f"base: {size['base_steps']} steps at {size['short']}",
        "extended": f"{extension} {size['long']}",
        "control": f"{extension} {size['short']} (control)",
    }


def values(results: dict[str, Any], arm: str, pairs: int, length: int, measure: str) -> list[float]:
    """A measure of one arm at one length, with one number of pairs: a value for each seed."""
    return [
        scores[measure]
        for run in results["runs"]
        if run["arm"] == arm
        for scores in run["scores"]
        if scores["pairs"] == pairs and scores["length"] == length
    ]


def table(results: dict[str, Any]) -> str:
    """A Markdown table: for each number of pairs and arm, the median score over seeds, with its range, at each length.

    Args:
        results: from `experiment`.
    """
    size = results["settings"]
    rows = []
    for pairs in size["asked_pairs"]:
        for arm, title in titles(results).items():
            scores = (values(results, arm, pairs, length, "score") for length in size["lengths"])
            rows.append([str(pairs), title, *(median_and_range(seeds, ".2f") for seeds in scores)])
    return markdown_table(["pairs", "", *(f"@{length}" for length in size["lengths"])], rows)


def outcome(results: dict[str, Any]) -> str:
    """What came out: the scores at twice the length of the longer rows, with the most pairs."""
    size = results["settings"]
    length, pairs = 2 * size["long"], max(size["asked_pairs"])
    scores = {arm: values(results, arm, pairs, length, "score") for arm in COLOURS}
    middle = {arm: statistics.median(seeds) for arm, seeds in scores.items()}
    better = middle["extended"] >= KEPT and middle["extended"] > max(middle["control"], middle["base"])
    verdict = "agrees with the claim" if better else "contradicts the claim"
    figures = {arm: _scores(results, length, pairs, arm) for arm in COLOURS}
    far = max(size["lengths"])
    return (
        f"At {length} tokens, twice the longer rows, among {pairs} pairs the score is {figures['extended']} after "
        f"{size['extension_steps']} steps at {size['long']}, {figures['control']} after as many tokens at "
        f"{size['short']} and {figures['base']} before: this {verdict}. The base finds much there already; the effect "
        f"is clear at {far} tokens: {_scores(results, far, pairs, 'extended')}, against "
        f"{_scores(results, far, pairs, 'control')} and {_scores(results, far, pairs, 'base')}."
    )


def _scores(results: dict[str, Any], length: int, pairs: int, arm: str) -> str:
    return median_and_range(values(results, arm, pairs, length, "score"), ".2f")


def draw(path: Path, results: dict[str, Any]) -> None:
    """Plot as SVG score and nats over the length, a column for each number of pairs: lines are medians, dots seeds.

    Args:
        path: the file.
        results: from `experiment`.
    """
    size = results["settings"]

    def paint(figure: Any) -> None:
        panels = figure.subplots(2, len(size["asked_pairs"]), sharex=True, sharey="row", squeeze=False)
        for row, (measure, title) in enumerate({"score": "score", "nats": "loss on the answer, nats"}.items()):
            for panel, pairs in zip(panels[row], size["asked_pairs"]):
                _draw_panel(panel, results, pairs, measure)
                panel.set_title(f"{title}, {pairs} pairs", loc="left", fontsize=12)
        for panel in panels[-1]:
            panel.set_xlabel("tokens of the row; dotted: lengths trained on")
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper left", frameon=False, ncols=2)

    save_plot(path, (8.5, 6.0), paint)


def _draw_panel(panel: Any, results: dict[str, Any], pairs: int, measure: str) -> None:
    size = results["settings"]
    lengths = size["lengths"]
    for arm, title in titles(results).items():
        numbers = [values(results, arm, pairs, length, measure) for length in lengths]
        panel.plot(
            lengths, [statistics.median(seeds) for seeds in numbers], color=COLOURS[arm], linewidth=2, label=title
        )
        for seeds in zip(*numbers):
            panel.plot(lengths, seeds, "o", color=COLOURS[arm], markersize=4, alpha=0.5)
    for trained, arm in ((size["short"], "base"), (size["long"], "extended")):
        panel.axvline(trained, color=COLOURS[arm], linestyle=":", linewidth=1)
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [str(length) for length in lengths])
    panel.minorticks_off()
    if measure == "score":
        panel.set_ylim(-0.03, 1.03)
