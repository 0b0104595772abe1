"""Results of the RSDB experiment: measures of each run, a table beside the report's figures, and a plot."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from plots import markdown_table, median_and_range, save_plot
from rsdb_arms import ARMS, CURVES

from trinity.io.json_files import to_json
from trinity.io.local import write_atomically

FEWEST_STEPS = 8
"""Half of them are enough to fit a parabola with residuals."""

ROWS = {
    "batch_het": ("BatchHet, mean, nats", "0.54 (−46 %); Large 0.24 (4.23× lower)"),
    "loss_variance": ("loss, variance about a parabola, nats²", ""),
    "loss_step_variance": ("loss, ½ variance from step to step, nats²", "Large 0.42 (2.4× lower)"),
    "grad_norm_kurtosis": ("gradient norm, kurtosis", "0.078 (14.6 against 187)"),
    "grad_norm": ("gradient norm, mean", ""),
    "loss": ("training loss, mean, nats", ""),
    "validation_loss": ("validation loss at the end, mean over domains, nats", ""),
}
"""Measure → its title, and the report's ratio of RSDB to sequential, if it gives one."""


DECISIVE, HELD = ("batch_het", "loss_step_variance", "grad_norm_kurtosis"), 0.9
"""Measures that the report gives, and the ratio of RSDB to sequential below which one holds here."""


def measures(run: dict[str, Any]) -> dict[str, float]:
    """Measures over the last half of a run's steps, and the mean of its validation losses.

    Args:
        run: from train_arm.
    """
    half = {name: np.array(values[len(values) // 2 :]) for name, values in run["curves"].items()}
    return {
        "batch_het": float(half["batch_het"].mean()),
        "loss_variance": float(_detrended(half["loss"]).var()),
        "loss_step_variance": float(np.diff(half["loss"]).var() / 2),
        "grad_norm_kurtosis": kurtosis(half["grad_norm"]),
        "grad_norm": float(half["grad_norm"].mean()),
        "loss": float(half["loss"].mean()),
        "validation_loss": statistics.mean(run["validation"].values()),
    }


def kurtosis(values: np.ndarray) -> float:
    """The fourth standardised moment, E[(x − μ)⁴]/σ⁴: 3 for a normal distribution, at most the number of values."""
    deviations = values - values.mean()
    return float((deviations**4).mean() / (deviations**2).mean() ** 2)


def _detrended(values: np.ndarray) -> np.ndarray:
    """A curve minus its trend, the least-squares parabola."""
    x = np.linspace(-1, 1, len(values))
    return values - np.polyval(np.polyfit(x, values, 2), x)


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """The measures as a Markdown table: each arm's median over seeds with its range, and the report's ratio.

    Args:
        runs: arm → its runs, by seed, each with "measures".
    """
    rows = []
    for name, (title, report) in ROWS.items():
        values = {arm: [run["measures"][name] for run in arm_runs] for arm, arm_runs in runs.items()}
        ratio = statistics.median(values["rsdb"]) / statistics.median(values["sequential"])
        cells = [median_and_range(arm_values) for arm_values in values.values()]
        rows.append([title, *cells, f"{ratio:.3g}", report])
    return markdown_table(["", *(ARMS[arm].title for arm in runs), "RSDB / sequential", "in the report"], rows)


def runs_by_arm(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Arm → its runs, by seed, from a results file."""
    return {arm: [run for run in results["runs"] if run["arm"] == arm] for arm in ARMS}


def outcome(results: dict[str, Any]) -> str:
    """What came out."""
    middle = {
        arm: {name: statistics.median(run["measures"][name] for run in runs) for name in ROWS}
        for arm, runs in runs_by_arm(results).items()
    }

    def ratio(name: str, arm: str = "rsdb") -> float:
        return middle[arm][name] / middle["sequential"][name]

    held = sum(ratio(name) < HELD for name in DECISIVE)
    verdict = {0: "contradicts the claim", len(DECISIVE): "agrees with the claim"}.get(
        held, "agrees in part with the claim"
    )
    return (
        f"Against sequential packing RSDB has {ratio('batch_het'):.2f} times the BatchHet, "
        f"{ratio('loss_step_variance'):.2f} times the variance of the loss from step to step and "
        f"{ratio('grad_norm_kurtosis'):.2f} times the kurtosis of the gradient norm: this {verdict}. The variance of "
        f"the loss about its trend is {ratio('loss_variance'):.2f} times as large, and the validation loss "
        f"{middle['rsdb']['validation_loss']:.2f} nats against {middle['sequential']['validation_loss']:.2f}. "
        f"Sequential packing in 48 streams, this project's default, has {ratio('batch_het', 'sequential_48'):.2f} "
        f"times the BatchHet of 4 streams, and a validation loss of {middle['sequential_48']['validation_loss']:.2f}."
    )


def write_results(path: Path, about: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> None:
    """Write all results as JSON, one run a line. Curves are rounded to five digits, measures are from full precision.

    Args:
        path: the file.
        about: further fields, by name.
        runs: arm → its runs, by seed.
    """
    write_atomically(path, _lines(about, runs))


def _lines(about: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    head = to_json(about, indent=1, ensure_ascii=False)
    yield head.removesuffix("\n}") + ',\n "runs": [\n'
    lines = []
    for arm, arm_runs in runs.items():
        for seed, run in enumerate(arm_runs):
            curves = {name: [float(f"{value:.5g}") for value in values] for name, values in run["curves"].items()}
            line = {"arm": arm, "seed": seed, "measures": measures(run), "validation": run["validation"]}
            lines.append("  " + to_json(line | {"curves": curves}))
    yield ",\n".join(lines) + "\n ]\n}\n"


COLOURS = {"sequential": "#d95f02", "rsdb": "#1f5fbf", "sequential_48": "#7a7a7a"}
SMOOTHED_STEPS, EVERY = 25, 4
TITLES = ("Training loss, nats", "BatchHet, nats", "Gradient norm before clipping")


def draw(path: Path, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Plot the curves as SVG, one panel each: thin lines, seed 0; thick, the mean over SMOOTHED_STEPS and all seeds.

    Args:
        path: the file.
        runs: arm → its runs, by seed.
    """

    def paint(figure: Any) -> None:
        for panel, name, title in zip(figure.subplots(len(CURVES), 1, sharex=True), CURVES, TITLES):
            _draw_panel(panel, name, runs)
            panel.set_title(title, loc="left", fontsize=12)
        panel.set_xlabel(f"step; thin: seed 0, thick: mean of all seeds over {SMOOTHED_STEPS} steps")
        figure.legend(*panel.get_legend_handles_labels(), loc="outside upper left", frameon=False)

    save_plot(path, (5.2, 9.0), paint)


def _draw_panel(panel: Any, name: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    after_warmup = []
    for arm, arm_runs in runs.items():
        curves = np.array([run["curves"][name] for run in arm_runs])
        width = min(SMOOTHED_STEPS, curves.shape[1])
        smooth = np.convolve(curves.mean(axis=0), np.full(width, 1 / width), "valid")[::EVERY]
        panel.plot(curves[0], color=COLOURS[arm], linewidth=0.5, alpha=0.4)
        middle = EVERY * np.arange(len(smooth)) + (width - 1) / 2
        panel.plot(middle, smooth, color=COLOURS[arm], linewidth=2, label=ARMS[arm].title)
        after_warmup.append(curves[0, curves.shape[1] // 10 :])
    low, high = np.min(after_warmup), np.max(after_warmup)
    panel.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
