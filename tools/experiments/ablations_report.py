"""Results of the ablations: measures of each arm, tables, plot."""

import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiment import Record, cost, records_of
from plots import COLOURS, markdown_table, median_and_range, save_plot, with_minus
from spikes import Spike, find_spikes

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


def spikes(record: Record, ignored: int) -> list[Spike]:
    """Spikes of loss or gradient norm in a run's curves after the ignored steps."""
    loss, grad_norm = (record["curves"][name][ignored:] for name in ("loss", "grad_norm"))
    return [spike._replace(step=spike.step + ignored) for spike in find_spikes(loss, grad_norm, SPIKE_WINDOW)]


def spikes_of_batches(results: Record) -> set[tuple[int, int]]:
    """(seed, step) of the spikes that more than one run of a seed has: all runs of a seed read the same batches."""
    ignored = results["settings"]["size"]["ignored"]
    found = Counter((run["seed"], spike.step) for run in results["parts"] for spike in spikes(run, ignored))
    return {place for place, runs in found.items() if runs > 1}


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
        "peak": ("largest over median gradient norm", ".1f", lambda r: _peak(r["curves"]["grad_norm"][ignored:])),
        "attention": (
            "largest attention logit", ".1f",
            lambda r: _largest(r["attention_logits"][ignored // size["probe_every"] :]),
        ),
        "head": ("largest head logit", ".1f", lambda r: _largest(r["curves"]["max_head_logit"][ignored:])),
        "max_violation": ("MaxVio", ".2f", lambda r: r["max_violation"]),
        "spikes": ("spikes", ".0f", lambda r: len(spikes(r, ignored))),
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
        head = [_times(rate), "validation loss, nats", "difference to the whole recipe"]
        tables.append(markdown_table([*head, *(title for title, _, _ in measures(size).values())], rows))
    return "\n\n".join(tables)


def less_stable(results: Record, arm: str, rate: float) -> list[str]:
    """In what an arm is less stable than the whole recipe: names of measures."""
    size, of_batches = results["settings"]["size"], spikes_of_batches(results)
    found = []
    for name in STABILITY:
        _, _, measure = measures(size)[name]
        values, whole = ([measure(run) for run in runs_of(results, which, rate)] for which in (arm, "full"))
        if name == "spikes":
            worse = any(
                (run["seed"], spike.step) not in of_batches
                for run in runs_of(results, arm, rate)
                for spike in spikes(run, size["ignored"])
            )
        elif name == "not_finite":
            worse = max(values) > max(whole)
        else:
            worse = statistics.median(values) > RATIO * statistics.median(whole)
        if worse:
            found.append(name)
    return found


def _effect(differences_of_arm: list[float]) -> str:
    if min(differences_of_arm) >= MATTERS:
        return "higher"
    return "lower" if max(differences_of_arm) <= -MATTERS else "no clear change"


def outcome(results: Record) -> str:
    """What came out: the loss, the stability, the spikes, and what that says of the claim."""
    arms = [arm for arm in TITLES if arm != "full"]
    rates = results["settings"]["size"]["rates"]
    found = {(arm, rate): differences(results, arm, rate) for arm in arms for rate in rates}
    sentences = []
    for effect in ("higher", "lower"):
        clauses = [
            f"{TITLES[arm]} at {_times(rate)} ({statistics.median(values):+.3f} nats)"
            for (arm, rate), values in found.items()
            if _effect(values) == effect
        ]
        sentences.append(f"The loss is {effect} than with the whole recipe: {'; '.join(clauses) or 'nowhere'}.")
    unclear = [TITLES[arm] for arm in arms if all(_effect(found[arm, rate]) == "no clear change" for rate in rates)]
    if unclear:
        sentences.append(f"No clear change at any rate: {', '.join(unclear)}.")
    unstable = {place: less_stable(results, *place) for place in found}
    clauses = [
        f"{TITLES[arm]} at {_times(rate)} ({', '.join(_compared(results, name, arm, rate) for name in names)})"
        for (arm, rate), names in unstable.items()
        if names
    ]
    sentences += [f"Less stable: {'; '.join(clauses) or 'nothing'}.", _spikes_of_all(results)]
    helps = {arm for (arm, _), names in unstable.items() if names}
    shown = (
        "This agrees with the claim"
        if len(helps) == len(arms)
        else "This agrees in part with the claim: the other parts show no effect on stability at this size"
        if helps
        else "This shows no clear difference of stability"
    )
    return with_minus(f"{' '.join(sentences)} {shown}. ({cost(results)})")


def _times(rate: float) -> str:
    return "the recipe's rates" if rate == 1 else f"{rate:g} times the rates"


def _compared(results: Record, name: str, arm: str, rate: float) -> str:
    """A measure of stability of an arm, against that of the whole recipe; of medians, or of the worst runs."""
    title, digits, measure = measures(results["settings"]["size"])[name]
    middle = max if name in ("spikes", "not_finite") else statistics.median
    values = [middle([measure(run) for run in runs_of(results, which, rate)]) for which in (arm, "full")]
    return "{} {:{digits}} against {:{digits}}".format(title, *values, digits=digits)


def _spikes_of_all(results: Record) -> str:
    """How many spikes all runs have, in what, and how many of them are of a batch."""
    of_batches, runs = spikes_of_batches(results), results["parts"]
    found = [(run["seed"], spike) for run in runs for spike in spikes(run, results["settings"]["size"]["ignored"])]
    if not found:
        return f"No run of all {len(runs)} has a spike."
    in_loss = sum(spike.in_loss for _, spike in found)
    shared = sum((seed, spike.step) in of_batches for seed, spike in found)
    places = ", ".join(f"step {step} of seed {seed}" for seed, step in sorted(of_batches))
    at = f" ({places})" if places else ""
    return (
        f"All {len(runs)} runs together have {len(found)} spikes, {in_loss} in the loss; {shared} of them are at a "
        f"step where several runs of a seed have one{at}: the batch causes these, not the missing part."
    )


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
                    label = _times(rate) if place == 0 and panel is panels[1] else None
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
