"""A small plot of a run for a README or a note: loss and MaxVio over tokens, as an SVG or PNG file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trinity.errors import UserError
from trinity.reporting.downsample import downsample, smooth
from trinity.reporting.jsonl import Columns
from trinity.reporting.run_log import read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png")
VALIDATION = "validation_loss."
# text stays text; the same run gives the same bytes. Any: matplotlib's stubs list every key as a Literal
_RC_PARAMS: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "trinity"}


def save_plot(run_dir: Path, out: Path) -> Path:
    """Write the plot of a run to a file.

    Args:
        run_dir: a run directory with at least one step.
        out: an .svg or .png file; its folder must exist.
    Returns:
        `out`.
    Raises:
        UserError: not a run directory, another file format, or matplotlib is not installed.
    """
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"--out={out} is not an image that can be written; end its name in {' or '.join(FORMATS)}")
    run = read_run(run_dir)
    figure = plot_run(run.name, run.metrics)
    from matplotlib import rc_context

    metadata = {"Date": None} if out.suffix.lower() == ".svg" else None
    with rc_context(_RC_PARAMS):
        figure.savefig(out, dpi=120, metadata=metadata)
    return out


def plot_run(name: str, metrics: Columns) -> "Figure":
    """Two charts side by side: training and validation loss, and expert imbalance (MaxVio), over tokens.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        raise UserError('the plot needs matplotlib; install it: pip install "trinity-moe[experiments]"') from None
    figure = Figure(figsize=(8.5, 3), layout="constrained")
    loss, violation = figure.subplots(1, 2)
    tokens = metrics["tokens"]
    _curve(loss, tokens, metrics["loss"], "training", faint=True)
    _curve(loss, tokens, smooth(metrics["loss"])[0], "training, smoothed")
    for field in metrics.names(VALIDATION):
        _points(loss, tokens, metrics[field], f"validation {field.removeprefix(VALIDATION)}")
    loss.set(title=f"{name}: loss", xlabel="tokens", ylabel="nats per token")
    _curve(violation, tokens, metrics["max_violation"], "worst layer")
    _curve(violation, tokens, metrics["max_violation_mean"], "mean over layers")
    violation.set(title="expert imbalance (MaxVio)", xlabel="tokens", ylim=(0, None))
    for axes in (loss, violation):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize="small")
    return figure


def _curve(axes: "Axes", x_N: np.ndarray, y_N: np.ndarray, label: str, faint: bool = False) -> None:
    points = downsample(y_N)
    if len(points):
        axes.plot(x_N[points], y_N[points], label=label, linewidth=0.8 if faint else 1.5, alpha=0.4 if faint else 1.0)


def _points(axes: "Axes", x_N: np.ndarray, y_N: np.ndarray, label: str) -> None:
    points = downsample(y_N)
    axes.plot(x_N[points], y_N[points], "o", label=label, markersize=5)
