"""Optimizers on functions whose minimum is known, their replay, and the Pareto front against its definition."""

import math
import random
import sys
from collections.abc import Callable

import numpy as np
import pytest

from tests.malformed.refusals import refusal
from trinity.merging.search.objectives import front
from trinity.merging.search.optimizers import GRID, CmaEs, LineSearch, Optimizer


def minimise(optimizer: Optimizer, function: Callable[[list[float]], float], most: int) -> list[list[float]]:
    """All points, in order."""
    points: list[list[float]] = []
    while len(points) < most and (asked := optimizer.ask()):
        points += asked
        optimizer.tell(asked, [function(point) for point in asked])
    return points


@pytest.mark.parametrize("target", [0.0, 0.137, 0.5, 0.731, 1.0])
def test_line_search(target: float) -> None:
    """To its precision, 1/1000, in fewer points than the default budget of a merge back, the recipe's start aside."""
    optimizer = LineSearch()
    points = minimise(optimizer, lambda point: (point[0] - target) ** 2, 100)
    assert min(abs(point[0] - target) for point in points) <= 1e-3
    assert len(points) <= 21
    assert optimizer.ask() == []
    assert "converged" in optimizer.reason()


def test_line_search_takes_the_better_minimum() -> None:
    """Two minima; golden section alone, from both ends, would end in the wide one."""
    points = minimise(LineSearch(), lambda x: min((x[0] - 0.7) ** 2, 20 * (x[0] - 0.15) ** 2 - 0.1), 100)
    assert min(abs(point[0] - 0.15) for point in points) <= 1e-3
    assert [point[0] for point in points[:GRID]] == [number / (GRID - 1) for number in range(GRID)]


def test_cma_es() -> None:
    """A quadratic with a minimum on a bound; some costs are infinite."""
    target = [0.2, 0.9, 1.0]

    def cost(point: list[float]) -> float:
        assert all(0 <= x <= 1 for x in point)
        return math.inf if point[0] > 0.8 else sum((4**k) * (x - t) ** 2 for k, (x, t) in enumerate(zip(point, target)))

    points = minimise(CmaEs([0.5] * 3, 0.25, 0), cost, 500)
    best = min(points, key=cost)
    assert max(abs(x - t) for x, t in zip(best, target)) < 1e-2


def test_replay_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same costs give the same points, whatever else draws from numpy's global numbers; which stay undisturbed."""

    def cost(point: list[float]) -> float:
        return sum((x - 0.3) ** 2 for x in point)

    first = minimise(CmaEs([0.5] * 4, 0.25, 7), cost, 80)
    np.random.seed(5)
    expected = np.random.rand(3)
    np.random.seed(5)
    assert minimise(CmaEs([0.5] * 4, 0.25, 7), lambda point: cost(point) + 0 * np.random.rand(), 0) == []
    assert np.array_equal(np.random.rand(3), expected)
    second = minimise(CmaEs([0.5] * 4, 0.25, 7), lambda point: cost(point) + 0 * np.random.rand(), 80)
    assert second == first
    assert minimise(CmaEs([0.5] * 4, 0.25, 8), cost, 80) != first
    assert len(minimise(CmaEs([0.5] * 4, 0.25, 7, population=5), cost, 1)) == 5
    monkeypatch.setitem(sys.modules, "cma", None)
    assert 'pip install "trinity-moe[search]"' in refusal(lambda: CmaEs([0.5] * 4, 0.25, 7))


def test_front() -> None:
    """Against the definition; equal points are there once, points that are not finite not at all."""
    draw = random.Random(3)
    points = [(draw.randint(0, 9), draw.randint(0, 9), draw.randint(0, 9)) for _ in range(60)]
    found = [points[number] for number in front([*points, (math.nan, 0, 0), (math.inf, -1, -1)])]
    assert len(set(found)) == len(found)
    assert set(found) == {
        p for p in points if not any(q != p and all(b <= a for a, b in zip(p, q)) for q in points)
    }  # fmt: skip
