"""Downsample long curves without losing their peaks, and smooth noisy ones, so that a phone can draw them."""

from itertools import pairwise

import numpy as np

MAX_POINTS = 2000
"""Points of one curve. Not from the report: what a phone draws quickly."""
SMOOTHING_SHARE = 100
"""The mean's span is at most the run's steps divided by this. Not from the report."""
GROWTH = 10
"""The span is also at most 1 + the steps so far divided by this, so that the mean does not lag on a steep start. Not
from the report."""


def downsample(y_N: np.ndarray, most: int = MAX_POINTS) -> np.ndarray:
    """Indices of the points of a curve to draw: all finite ones, or the lowest and highest of `most`/2 equal parts.

    Args:
        y_N: [N] values; NaN where there is none.
        most: maximum number of points, even.
    Returns:
        ascending indices into y_N, int64.
    """
    finite = np.flatnonzero(np.isfinite(y_N))
    if len(finite) <= most:
        return finite
    ends = np.linspace(0, len(finite), most // 2 + 1).astype(np.int64)
    parts = [finite[begin:end] for begin, end in pairwise(ends)]
    extremes = [part[pick(y_N[part])] for part in parts for pick in (np.argmin, np.argmax)]
    return np.unique(np.array(extremes))


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` evenly spaced indices of a list of `count`, ascending, with the first and the last."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(most, count)).tolist()})


def smooth(y_N: np.ndarray) -> tuple[np.ndarray, float]:
    """Exponential moving average: m ← m + (y − m)/span, with a span in steps that grows to N/SMOOTHING_SHARE.

    Args:
        y_N: [N]; NaN leaves the mean unchanged.
    Returns:
        the mean [N] (NaN before the first finite value), and the longest span.
    """
    longest = max(1.0, len(y_N) / SMOOTHING_SHARE)
    mean = np.nan
    smoothed = np.full(len(y_N), np.nan)
    for index, y in enumerate(y_N.tolist()):
        if y == y:
            span = min(longest, 1 + index / GROWTH)
            mean = y if mean != mean else mean + (y - mean) / span
        smoothed[index] = mean
    return smoothed, longest
