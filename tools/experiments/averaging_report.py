"""Results of the comparison of averages with decays: tables, plot."""

import statistics
from pathlib import Path
from typing import Any

from experiment import Record, cost, records_of
from plots import COLOURS, markdown_table, median_and_range, save_plot

ARMS = {"decayed": "decay of the rate", "averaged": "average of all checkpoints", "few": "average of few checkpoints"}


def losses(results: Record, arm: str) -> dict[tuple[str, str], list[float]]:
    """(shape, length) → the validation loss of each seed."""
    runs = records_of(results, "losses")
    return {
        (shape, share): [run[arm][shape][share] for run in runs]
        for shape, by_share in runs[0][arm].items()
        for share in by_share
    }


def best(results: Record, arm: str) -> tuple[tuple[str, str], list[float]]:
    """The setting of an arm with the lowest median, and its losses."""
    return min(losses(results, arm).items(), key=lambda item: statistics.median(item[1]))


def report(results: Record) -> str:
    """A table of all settings, and one of the best of each arm against the constant run."""
    shares = [f"{share:g}" for share in results["settings"]["size"]["shares"]]
    constant = [run["constant"] for run in records_of(results, "losses")]
    rows = []
    for arm, title in ARMS.items():
        values = losses(results, arm)
        for shape in dict.fromkeys(shape for shape, _ in values):
            rows.append([f"{title}, {shape}", *(median_and_range(values[shape, share], ".4f") for share in shares)])
    rows.append(["constant rate, last checkpoint", *([median_and_range(constant, ".4f")] * len(shares))])
    gains = []
    for arm, title in ARMS.items():
        (shape, share), values = best(results, arm)
        gain = [after - before for before, after in zip(constant, values)]
        gains.append([
            f"{title}, {shape} over {_percent(share)}", median_and_range(values, ".4f"), median_and_range(gain, "+.4f")
        ])  # fmt: skip
    return "\n\n".join([
        markdown_table(["validation loss, nats", *(f"last {_percent(share)} of the steps" for share in shares)], rows),
        markdown_table(["best of each", "validation loss, nats", "against the constant run"], gains),
    ])  # fmt: skip


def outcome(results: Record) -> str:
    """What came out."""
    (decay, decay_share), decayed = best(results, "decayed")
    (shape, share), averaged = best(results, "averaged")
    difference = [a - d for a, d in zip(averaged, decayed)]
    constant = statistics.median(run["constant"] for run in records_of(results, "losses"))
    gained = constant - statistics.median(averaged)
    whole = constant - statistics.median(decayed)
    good = statistics.median(averaged) <= statistics.median(decayed)
    verdict = "agrees with the claim" if good else "contradicts the claim"
    of_it = f": {100 * gained / whole:.0f} % of that, without training" if whole > 0 else ""
    shares = results["settings"]["size"]["shares"]
    ends = [what for what, of in (("average", share), ("decay", decay_share)) if float(of) in (shares[0], shares[-1])]
    edge = f" The best {' and '.join(ends)} has the shortest or the longest length that was tried." if ends else ""
    return (
        f"The validation loss of the best average ({shape}, last {_percent(share)} of the steps) minus that of the "
        f"best decay ({decay}, last {_percent(decay_share)}) is {median_and_range(difference, '+.4f')} nats: "
        f"this {verdict}. Against the constant run, {constant:.4f} nats, the average gains {gained:.4f} and the decay "
        f"{whole:.4f} nats{of_it}.{edge} ({cost(results)})"
    )


def _percent(share: str) -> str:
    return f"{100 * float(share):.0f} %"


def draw(path: Path, results: Record) -> None:
    """Plot the validation loss by length of decay or average: lines are medians, dots seeds."""

    def paint(figure: Any) -> None:
        panel = figure.subplots()
        series = [(arm, shape) for arm in ARMS for shape in dict.fromkeys(shape for shape, _ in losses(results, arm))]
        for colour, (arm, shape) in zip(COLOURS, series):
            values = {float(share): v for (of, share), v in losses(results, arm).items() if of == shape}
            panel.plot(list(values), [statistics.median(v) for v in values.values()], color=colour,
                       linestyle="--" if arm == "decayed" else "-", label=f"{ARMS[arm]}, {shape}")  # fmt: skip
            for share, seeds in values.items():
                panel.plot([share] * len(seeds), seeds, "o", color=colour, markersize=4, alpha=0.6)
        constant = statistics.median(run["constant"] for run in records_of(results, "losses"))
        panel.axhline(constant, color="black", linestyle=":", linewidth=1, label="constant rate")
        panel.set(xlabel="length of the decay or the average, share of the steps")
        panel.set_title("Validation loss, nats", loc="left", fontsize=11)
        figure.legend(*panel.get_legend_handles_labels(), loc="outside upper left", frameon=False, ncols=2)

    save_plot(path, (7.5, 5.0), paint)
