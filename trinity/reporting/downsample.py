"""Curves that a phone can draw: long ones thinned without losing their peaks, noisy ones smoothed."""

from itertools import pairwise

import numpy as np

MOST_POINTS = 2000
"""Of one curve. Ours."""
SMOOTHED_SHARE = 100
"""A mean goes over at most the run's steps over this. Ours."""
GROWTH = 10
"""And over at most the steps so far over this, so that it does not lag where the curve is steep. Ours."""


def thin(y_N: np.ndarray, most: int = MOST_POINTS) -> np.ndarray:
    """Which points of a curve to draw: all finite ones, or the lowest and highest of each of most/2 equal stretches.

    Args:
        y_N: [N] heights; NaN where there is none.
        most: points to draw at most, even.
    Returns:
        ascending indices into y_N, int64.
    """
    finite = np.flatnonzero(np.isfinite(y_N))
    if len(finite) <= most:
        return finite
    ends = np.linspace(0, len(finite), most // 2 + 1).astype(np.int64)
    stretches = [finite[begin:end] for begin, end in pairwise(ends)]
    extremes = [stretch[pick(y_N[stretch])] for stretch in stretches for pick in (np.argmin, np.argmax)]
    return np.unique(np.array(extremes))


def moments(count: int, most: int) -> list[int]:
    """Places in a list of `count`, ascending: at most `most`, evenly spaced, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(most, count)).tolist()})


def smooth(y_N: np.ndarray) -> tuple[np.ndarray, float]:
    """An exponential mean: m ← m + (y − m)/span, with a span in steps that grows to N/SMOOTHED_SHARE.

    Args:
        y_N: [N]; where it is NaN the mean stays.
    Returns:
        [N] (NaN before the first finite value), and the longest span.
    """
    longest = max(1.0, len(y_N) / SMOOTHED_SHARE)
    mean = np.nan
    smoothed = np.full(len(y_N), np.nan)
    for index, y in enumerate(y_N.tolist()):
        if y == y:
            span = min(longest, 1 + index / GROWTH)
            mean = y if mean != mean else mean + (y - mean) / span
        smoothed[index] = mean
    return smoothed, longest
