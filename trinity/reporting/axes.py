"""The horizontal axes of a figure: tokens below, and the steps at which they were reached above.

Shapes: N records in rising order of step.
"""

import math

import numpy as np

from trinity.reporting.jsonl import Columns

MOST_TICKS = 5
"""Of the step axis: what a phone has room for. Not from the report."""


def positions(columns: Columns) -> np.ndarray:
    """[N] tokens seen by the end of each record's step, or the steps where tokens are not recorded.

    A record without tokens (a validation before step 1) stands where its neighbours put it; step 0 is at 0.
    """
    steps_N = np.array(columns.steps, dtype=np.float64)
    tokens_N = columns["tokens"]
    known = np.isfinite(tokens_N)
    if not known.any():
        return steps_N
    return np.interp(steps_N, np.append(0, steps_N[known]), np.append(0, tokens_N[known]))


def unit(several: list[Columns]) -> str:
    """What the horizontal axis counts."""
    if not any("tokens" in columns for columns in several):
        return "steps"
    return "tokens" if all("tokens" in columns for columns in several) else "tokens, or steps of a run without them"


def words(several: list[Columns]) -> str:
    """The same, with where each axis stands."""
    return f"{unit(several)} (below) and steps (above)" if step_axis(several) else unit(several)


def layout(several: list[Columns]) -> dict:
    """The axes of a figure's layout; the page adds the curve without points that plotly draws the upper one for."""
    own = {"xaxis": {"exponentformat": "B"}}
    ticks = step_axis(several)
    if ticks:
        places, labels = zip(*ticks)
        above = {"overlaying": "x", "side": "top", "matches": "x", "showgrid": False}
        own["xaxis2"] = above | {"tickvals": list(places), "ticktext": list(labels)}
    return own


def step_axis(several: list[Columns]) -> list[tuple[float, str]]:
    """(tokens, step) of the ticks of a step axis; none where runs reach a step at different tokens, or count no tokens.

    Steps are multiples of 1, 2 or 5 times a power of ten.
    """
    if not all("tokens" in columns for columns in several):
        return []
    found: dict[int, float] = {}
    for columns in several:
        for step, place in zip(columns.steps, positions(columns).tolist()):
            if found.setdefault(step, place) != place:
                return []
    steps = sorted(found)
    every = _nice((steps[-1] - steps[0]) / MOST_TICKS)
    ticks = range(math.ceil(steps[0] / every) * every, steps[-1] + 1, every)
    places = np.interp(ticks, steps, [found[step] for step in steps]).tolist()
    return [(place, f"{step:,}") for step, place in zip(ticks, places)]


def _nice(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, … that is not below `least`."""
    power = 10 ** math.floor(math.log10(max(least, 1)))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)
