"""Tables and plots of the experiments' results: a Markdown table, median with range, an SVG of matplotlib."""

import io
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from trinity.errors import UserError
from trinity.io.local import write_atomically

COLOURS = ("#1f5fbf", "#d95f02", "#1b8a5a", "#7a7a7a", "#a0307a", "#b58900", "#4b4b9b", "#00868b")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column holds the rows' names."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_minus(text: str) -> str:
    """The text with a minus sign in place of the hyphen before each negative number."""
    return re.sub(r"(?<![\w.,–-])-(?=\.?\d)", "−", text)


def median_and_range(values: Sequence[float], digits: str = ".3g") -> str:
    """The median over seeds, and in brackets the smallest and the largest value."""
    middle, low, high = (format(value, digits) for value in (statistics.median(values), min(values), max(values)))
    if len(values) == 1:
        return with_minus(middle)
    to = " to " if "-" in low + high or "+" in digits else "–"
    return with_minus(f"{middle} ({low}{to}{high})")


def save_plot(path: Path, size: tuple[float, float], paint: Callable[[Any], None]) -> None:
    """Write an SVG with the same bytes for the same results.

    Args:
        size: width and height, inches.
        paint: draws on a matplotlib Figure.
    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "the plot needs matplotlib; install it (pip install -e '.[experiments]') and run the same command again: "
            "finished runs are kept"
        ) from None
    style = {
        "font.size": 11, "svg.fonttype": "none", "svg.hashsalt": "experiments", "axes.grid": True, "grid.alpha": 0.4,
        "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", metadata={"Date": None, "Creator": None})
    write_atomically(path, (line.rstrip() + "\n" for line in drawing.getvalue().splitlines()))
