"""Downsampling and smoothing of curves."""

import numpy as np
import pytest

from trinity.reporting.downsample import downsample, evenly_spaced, smooth


@pytest.mark.parametrize("count", [1, 2, 3, 9, 10, 1001])
def test_evenly_spaced(count: int) -> None:
    """First, middle and last are included."""
    indices = evenly_spaced(count, 9)
    assert {0, count - 1} <= set(indices)
    assert min(abs(index - (count - 1) / 2) for index in indices) <= 0.5
    assert len(indices) == min(count, 9)


def test_short_curves_keep_all_points() -> None:
    """All finite points, in order."""
    assert downsample(np.array([1.0, np.nan, 3.0, np.inf])).tolist() == [0, 2]
    assert downsample(np.array([])).tolist() == []


def test_smooth() -> None:
    """Against the recursion m ← m + (y − m)/span with span = min(N/100, 1 + i/10); NaN leaves m unchanged."""
    y = np.random.default_rng(0).normal(size=500)
    y[[0, 7]] = np.nan
    smoothed, longest = smooth(y)
    mean, expected = y[1], [y[1]]
    for index in range(2, 500):
        mean = mean if index == 7 else mean + (y[index] - mean) / min(5, 1 + index / 10)
        expected.append(mean)
    assert np.isnan(smoothed[0])
    assert smoothed[1:].tolist() == expected
    assert longest == 5
