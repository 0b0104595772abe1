"""The horizontal axes of a figure: tokens below, the corresponding steps above.

Shapes: N records in ascending order of step.
"""

import math
from typing import Any

import numpy as np

from trinity.reporting.jsonl import Columns

MAX_TICKS = 5
"""Ticks of the step axis that fit a phone. Not from the report."""


def x_values(columns: Columns) -> np.ndarray:
    """[N] tokens at the end of each record's step, or the steps if tokens are not recorded.

    A record without tokens (a validation before step 1) is interpolated between its neighbours; step 0 is at 0.
    """
    steps_N = np.array(columns.steps, dtype=np.float64)
    tokens_N = columns["tokens"]
    recorded = np.isfinite(tokens_N)
    if not recorded.any():
        return steps_N
    return np.interp(steps_N, np.append(0, steps_N[recorded]), np.append(0, tokens_N[recorded]))


def x_unit(runs: list[Columns]) -> str:
    """The unit of the horizontal axis of a figure of these runs."""
    if not any("tokens" in columns for columns in runs):
        return "steps"
    return "tokens" if all("tokens" in columns for columns in runs) else "tokens, or steps of a run without them"


def x_label(runs: list[Columns]) -> str:
    """The units of both horizontal axes and their positions."""
    return f"{x_unit(runs)} (below) and steps (above)" if step_ticks(runs) else x_unit(runs)


def layout(runs: list[Columns]) -> dict[str, Any]:
    """The horizontal axes as plotly layout; the page adds an empty curve, without which plotly omits the upper axis."""
    axes: dict[str, Any] = {"xaxis": {"exponentformat": "B"}}
    ticks = step_ticks(runs)
    if ticks:
        tokens, labels = zip(*ticks)
        above = {"overlaying": "x", "side": "top", "matches": "x", "showgrid": False}
        axes["xaxis2"] = above | {"tickvals": list(tokens), "ticktext": list(labels)}
    return axes


def step_ticks(runs: list[Columns]) -> list[tuple[float, str]]:
    """(tokens, step) of the step axis's ticks; empty if a run has no tokens or runs reach a step at different tokens.

    Steps are multiples of 1, 2 or 5 times a power of ten.
    """
    if not all("tokens" in columns for columns in runs):
        return []
    tokens_at: dict[int, float] = {}
    for columns in runs:
        for step, tokens in zip(columns.steps, x_values(columns).tolist()):
            if tokens_at.setdefault(step, tokens) != tokens:
                return []
    steps = sorted(tokens_at)
    spacing = _round_up((steps[-1] - steps[0]) / MAX_TICKS)
    ticks = range(math.ceil(steps[0] / spacing) * spacing, steps[-1] + 1, spacing)
    tick_tokens = np.interp(ticks, steps, [tokens_at[step] for step in steps]).tolist()
    return [(tokens, f"{step:,}") for step, tokens in zip(ticks, tick_tokens)]


def _round_up(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, … that is not below `least`."""
    power = 10 ** math.floor(math.log10(max(least, 1)))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)
