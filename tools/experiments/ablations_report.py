"""Results of the ablations: measures of each arm, tables, plot."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiment import Record, cost, records_of
from plots import COLOURS, markdown_table, median_and_range, save_plot
from spikes import find_spikes

TITLES = {
    "full": "the whole recipe",
    "no_sequence_loss": "without sequence loss",
    "no_z_loss": "without z-loss",
    "no_depth_scale": "gains after a sublayer begin at 1",
    "no_post_norm": "without norms after a sublayer",
    "no_gate": "without the attention gate",
    "no_qk_norm": "without QK-norm",
}
RATIO = 2.0
"""A logit or a peak of the gradient norm this many times that of the whole recipe counts as less stable."""
MATTERS = 0.005
"""A difference of the loss, nats."""
SPIKE_WINDOW = 64
LOGIT_TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
STABILITY = ("peak", "attention", "head", "spikes", "not_finite")
"""Measures that show stability."""


def spikes(record: Record, ignored: int) -> int:
    """Spikes of loss or gradient norm in a run's curves after the ignored steps."""
    loss, grad_norm = (record["curves"][name][ignored:] for name in ("loss", "grad_norm"))
    return len(find_spikes(loss, grad_norm, SPIKE_WINDOW))


def _largest(values: list[float | None]) -> float:
    return max((value for value in values if value is not None), default=float("nan"))


def _peak(values: list[float | None]) -> float:
    finite = [value for value in values if value is not None]
    return max(finite) / statistics.median(finite) if finite else float("nan")


def measures(size: Record) -> dict[str, tuple[str, str, Callable[[Record], float]]]:
    """Name → its title, the format of its values, and the measure of a record."""
    ignored = size["ignored"]
    return {
        "grad_norm": ("largest gradient norm", ".2f", lambda r: _largest(r["curves"]["grad_norm"][ignored:])),
        "peak": ("its ratio to the median norm", ".1f", lambda r: _peak(r["curves"]["grad_norm"][ignored:])),
        "attention": (
            "largest attention logit", ".1f",
            lambda r: _largest(r["attention_logits"][ignored // size["probe_every"] :]),
        ),
        "head": ("largest head logit", ".1f", lambda r: _largest(r["curves"]["max_head_logit"][ignored:])),
        "max_violation": ("MaxVio", ".2f", lambda r: r["max_violation"]),
        "spikes": ("spikes", ".0f", lambda r: spikes(r, ignored)),
        "not_finite": ("steps that were not finite", ".0f", lambda r: r["not_finite"]),
    }  # fmt: skip


def runs_of(results: Record, arm: str, rate: float) -> list[Record]:
    """The runs of an arm at a rate, by seed."""
    return records_of(results, f"{arm}_{rate:g}x")


def differences(results: Record, arm: str, rate: float) -> list[float]:
    """Validation loss minus that of the whole recipe with the same seed and rate, nats; ∞ where a run diverged."""
    return [
        float("inf") if run["validation"] is None else run["validation"] - full["validation"]
        for run, full in zip(runs_of(results, arm, rate), runs_of(results, "full", rate))
    ]


def report(results: Record) -> str:
    """A table for each rate."""
    size = results["settings"]["size"]
    tables = []
    for rate in size["rates"]:
        rows = []
        for arm, title in TITLES.items():
            runs = runs_of(results, arm, rate)
            losses = [float("nan") if run["validation"] is None else run["validation"] for run in runs]
            difference = "" if arm == "full" else median_and_range(differences(results, arm, rate), "+.4f")
            cells = (
                median_and_range([measure(run) for run in runs], digits)
                for _, digits, measure in measures(size).values()
            )
            rows.append([title, median_and_range(losses, ".4f"), difference, *cells])
        head = [f"{rate:g} times the rates", "validation loss, nats", "difference to the whole recipe"]
        tables.append(markdown_table([*head, *(title for title, _, _ in measures(size).values())], rows))
    return "\n\n".join(tables)


def less_stable(results: Record, arm: str, rate: float) -> list[str]:
    """In what an arm is less stable than the whole recipe: titles of measures."""
    found = []
    for name in STABILITY:
        title, _, measure = measures(results["settings"]["size"])[name]
        values, whole = ([measure(run) for run in runs_of(results, which, rate)] for which in (arm, "full"))
        if name in ("spikes", "not_finite"):
            worse = max(values) > max(whole)
        else:
            worse = statistics.median(values) > RATIO * statistics.median(whole)
        if worse:
            found.append(title)
    return found


def outcome(results: Record) -> str:
    """What came out, a sentence for each arm."""
    sentences = []
    rates = results["settings"]["size"]["rates"]
    for arm, title in TITLES.items():
        if arm == "full":
            continue
        clauses = []
        for rate in rates:
            difference = differences(results, arm, rate)
            effect = (
                "higher"
                if min(difference) >= MATTERS
                else "lower"
                if max(difference) <= -MATTERS
                else "no clear change"
            )
            unstable = less_stable(results, arm, rate)
            stability = f"; less stable in: {', '.join(unstable)}" if unstable else ""
            clauses.append(f"{statistics.median(difference):+.3f} at {rate:g} times the rates ({effect}{stability})")
        sentences.append(f"{title[0].upper()}{title[1:]}: {' and '.join(clauses)}.")
    whole = [run for rate in rates for run in runs_of(results, "full", rate)]
    count = sum(measures(results["settings"]["size"])["spikes"][2](run) for run in whole)
    return (
        f"The validation loss against the whole recipe's, nats; higher or lower means by {MATTERS} or more for every "
        f"seed. {' '.join(sentences)} Spikes of the whole recipe: {count} in {len(whole)} runs. ({cost(results)})"
    ).replace("-0.", "−0.")


def draw(path: Path, results: Record) -> None:
    """Plot differences of the loss, and the largest logits and gradient norms, at each rate: a dot for each seed."""
    size = results["settings"]["size"]
    arms = list(reversed(TITLES))

    def paint(figure: Any) -> None:
        names = ("grad_norm", "attention", "head")
        panels = figure.subplots(1, 1 + len(names), sharey=True)
        for index, rate in enumerate(size["rates"]):
            for place, arm in enumerate(arms):
                runs = runs_of(results, arm, rate)
                columns = [[] if arm == "full" else [d for d in differences(results, arm, rate) if d < 10]]
                columns += [[measures(size)[name][2](run) for run in runs] for name in names]
                for panel, values in zip(panels, columns):
                    heights = [place + 0.25 * (0.5 - index)] * len(values)
                    label = f"{rate:g} times the rates" if place == 0 and panel is panels[1] else None
                    panel.plot(values, heights, "o", color=COLOURS[index], markersize=5, alpha=0.7, label=label)
        titles = (
            "loss against the whole\nrecipe's, nats",
            *(measures(size)[name][0].replace(" ", "\n", 1) for name in names),
        )
        for panel, title in zip(panels, titles):
            panel.set_title(title, loc="left", fontsize=11)
        panels[0].axvline(0, color="black", linewidth=1)
        panels[0].set_yticks(range(len(arms)), [TITLES[arm] for arm in arms])
        panels[2].set_xscale("log")
        low, high = panels[2].get_xlim()
        ticks = [tick for tick in LOGIT_TICKS if low < tick < high]
        panels[2].set_xticks(ticks, [str(tick) for tick in ticks])
        panels[2].minorticks_off()
        figure.legend(*panels[1].get_legend_handles_labels(), loc="outside upper left", frameon=False, ncols=2)

    save_plot(path, (11.0, 4.6), paint)
