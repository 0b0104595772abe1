"""Results of the scaling experiment: the fit, its prediction, tables, plot.

Shapes: R runs, A values of α.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from experiment import Record, cost, records_of
from plots import COLOURS, markdown_table, median_and_range, save_plot, with_minus

ALPHAS = np.arange(1, 151) / 100
DRAWS = 2000
NINE_TENTHS = (0.05, 0.95)


class Law(NamedTuple):
    """L(N) = E + A·N^-α, nats."""

    E: float
    A: float
    alpha: float

    def at(self, active: float) -> float:
        """The loss of N active parameters."""
        return self.E + self.A * active**-self.alpha


def fit(actives: Sequence[float], losses: Sequence[float]) -> Law:
    """The law with the least sum of squared errors; α is on the grid ALPHAS, E is not below 0.

    For each α the loss is linear in N^-α, so E and A have a closed form.
    """
    sizes, losses_R = np.asarray(actives, np.float64), np.asarray(losses, np.float64)
    scale = np.exp(np.log(sizes).mean())
    powers_AR = (sizes / scale) ** -ALPHAS[:, None]
    mean_A, mean = powers_AR.mean(axis=1), losses_R.mean()
    centred_AR = powers_AR - mean_A[:, None]
    factor_A = centred_AR @ (losses_R - mean) / np.square(centred_AR).sum(axis=1)
    floor_A = mean - factor_A * mean_A
    without_floor_A = powers_AR @ losses_R / np.square(powers_AR).sum(axis=1)
    factor_A, floor_A = np.where(floor_A < 0, without_floor_A, factor_A), np.maximum(floor_A, 0.0)
    errors_A = np.square(floor_A[:, None] + factor_A[:, None] * powers_AR - losses_R).sum(axis=1)
    best = int(errors_A.argmin())
    alpha = float(ALPHAS[best])
    return Law(float(floor_A[best]), float(factor_A[best] * scale**alpha), alpha)


def by_size(results: Record) -> dict[int, list[float]]:
    """N → the validation loss of each seed."""
    widths = results["settings"]["size"]["widths"]
    runs = [records_of(results, f"width_{width}") for width in widths]
    return {of_width[0]["active"]: [run["validation"] for run in of_width] for of_width in runs}


def _fit_all(losses: dict[int, list[float]]) -> Law:
    pairs = [(active, loss) for active, of_size in losses.items() for loss in of_size]
    return fit(*zip(*pairs))


def predict(results: Record, active: int) -> dict[str, Any]:
    """The prediction for a size that was not trained.

    Args:
        results: of the first four sizes.
        active: N of the fifth.
    Returns:
        "active"; "loss", the law there; "low" and "high", between which nine of ten medians of three runs should lie;
        "E", "A", "alpha".
    """
    losses = by_size(results)
    law = _fit_all(losses)
    random = np.random.default_rng(0)
    deviations = [loss - statistics.fmean(of_size) for of_size in losses.values() for loss in of_size]
    deviations = np.array(deviations) * 1.5**0.5
    drawn = []
    for _ in range(DRAWS):
        fitted = _fit_all({size: list(random.choice(of_size, len(of_size))) for size, of_size in losses.items()})
        drawn.append(fitted.at(active) + np.median(random.choice(deviations, 3)))
    low, high = np.quantile(drawn, NINE_TENTHS)
    return {"active": active, "loss": law.at(active), "low": float(low), "high": float(high)} | law._asdict()


def fifth_size(results: Record) -> int:
    """N of the fifth size."""
    from scaling import FULL_FIFTH, QUICK_FIFTH, Size, active_parameters

    full = results["settings"]["size"]["widths"] == list(Size().widths)
    return active_parameters(FULL_FIFTH if full else QUICK_FIFTH)


def _size_rows(results: Record) -> list[list[str]]:
    rows = []
    for width in results["settings"]["size"]["widths"]:
        runs = records_of(results, f"width_{width}")
        losses = median_and_range([run["validation"] for run in runs], ".4f")
        rows.append(
            [str(width), f"{runs[0]['parameters']:,}", f"{runs[0]['active']:,}", f"{runs[0]['tokens']:,}", losses]
        )
    return rows


HEAD = ["width", "parameters", "active without embedding and head, N", "tokens", "validation loss, nats"]


def report(results: Record) -> str:
    """A table of the sizes, and the law."""
    predicted = predict(results, fifth_size(results))
    law = f"L(N) = {predicted['E']:.3f} + {predicted['A']:.4g}·N^-{predicted['alpha']:.2f}"
    return f"{markdown_table(HEAD, _size_rows(results))}\n\n{law}"


def _prediction(predicted: Record) -> str:
    return f"{predicted['loss']:.4f} nats ({predicted['low']:.4f}–{predicted['high']:.4f})"


def outcome(results: Record) -> str:
    """What the four sizes predict."""
    predicted = predict(results, fifth_size(results))
    return f"The prediction for N = {predicted['active']:,} is {_prediction(predicted)}. ({cost(results)})"


def fifth_report(results: Record) -> str:
    """A table of the fifth size."""
    return markdown_table(HEAD, _size_rows(results))


def fifth_outcome(results: Record) -> str:
    """Whether the prediction holds."""
    predicted = results["settings"]["size"]["prediction"]
    ((active, losses),) = by_size(results).items()
    middle = statistics.median(losses)
    error = middle - predicted["loss"]
    verdict = "agrees with the claim" if predicted["low"] <= middle <= predicted["high"] else "contradicts the claim"
    return with_minus(
        f"Predicted for N = {active:,}: {_prediction(predicted)}; trained: {median_and_range(losses, '.4f')} nats, "
        f"{error:+.4f} nats ({100 * error / predicted['loss']:+.2f} %). This {verdict}. ({cost(results)})"
    )


def draw(path: Path, results: Record, first: Record | None = None) -> None:
    """Plot the losses by size, with the law: of four sizes their own, of the fifth the one that predicted it.

    Args:
        path: the file.
        results: of the four sizes, or of the fifth.
        first: with those of the fifth, those of the four sizes.
    """

    def paint(figure: Any) -> None:
        panel = figure.subplots()
        losses = ({} if first is None else by_size(first)) | by_size(results)
        predicted = results["settings"]["size"]["prediction"] or predict(results, fifth_size(results))
        law = Law(predicted["E"], predicted["A"], predicted["alpha"])
        sizes = np.geomspace(min([*losses, predicted["active"]]) / 1.2, predicted["active"] * 1.2, 60)
        panel.plot(sizes, [law.at(size) for size in sizes], color=COLOURS[3], label="the law, fitted to four sizes")
        error = [[predicted["loss"] - predicted["low"]], [predicted["high"] - predicted["loss"]]]
        panel.errorbar([predicted["active"]], [predicted["loss"]], error, color=COLOURS[1], marker="s", capsize=5,
                       label="prediction, and its range for a median of three runs")  # fmt: skip
        for index, (active, of_size) in enumerate(losses.items()):
            panel.plot([active] * len(of_size), of_size, "o", color=COLOURS[0], alpha=0.7, markersize=5,
                       label="" if index else "runs, three seeds")  # fmt: skip
        panel.set(xscale="log", xlabel="N, thousand active parameters without embedding and head")
        panel.set_xticks(list(losses), [f"{active / 1e3:.0f}" for active in losses])
        panel.minorticks_off()
        panel.set_title("Validation loss, nats", loc="left", fontsize=11)
        figure.legend(*panel.get_legend_handles_labels(), loc="outside upper left", frameon=False)

    save_plot(path, (7.0, 5.0), paint)
