"""Optimizers of a search, by ask and tell: CMA-ES for several variables, a line search for one.

Points lie in the unit cube, costs are minimised, infinity is allowed. The points asked for depend on the settings and
on the costs told so far alone: so a search that was interrupted asks for the same points when it is told the logged
costs.
"""

import math
import warnings
from typing import Any, Protocol

import numpy as np

from trinity.errors import UserError

INSTALL = 'a search of several variables needs the package cma; install it: pip install "trinity-moe[search]"'
GRID = 7
"""Points of the line search's first grid. Not from the report: fine enough for a loss along a line between two models,
which has one or two minima."""
_PRECISION = 1e-3
_GOLDEN = (math.sqrt(5) - 1) / 2


class Optimizer(Protocol):
    """Minimises a function on the unit cube."""

    def ask(self) -> list[list[float]]:
        """Points to evaluate; none when the search has converged. Every point must be told before the next ask."""

    def tell(self, points: list[list[float]], costs: list[float]) -> None:
        """The costs of the points of the last ask, in its order."""

    def reason(self) -> str:
        """Why there are no more points."""


class CmaEs:
    """CMA-ES of the package cma (Hansen, arXiv 1604.00772).

    Args:
        start: first mean.
        step: first standard deviation.
        seed: of its random numbers.
        population: points of a generation; None: 4 + 3 ln(number of variables).
    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, start: list[float], step: float, seed: int, population: int | None = None) -> None:
        try:
            import cma
        except ImportError:
            raise UserError(INSTALL) from None
        options: dict[str, Any] = {
            "bounds": [0, 1], "seed": seed + 1,  # cma draws a seed from the clock for 0
            "verbose": -9, "verb_log": 0, "verb_disp": 0, "signals_filename": None, "tolfun": 1e-9, "tolx": 1e-4,
        }  # fmt: skip
        if population is not None:
            options["popsize"] = population
        self._random: Any = None
        with _Numpy(self):
            self._strategy = cma.CMAEvolutionStrategy(start, step, options)

    def ask(self) -> list[list[float]]:
        with _Numpy(self):
            if self._strategy.stop():
                return []
            self._points = self._strategy.ask()
        return [point.tolist() for point in self._points]

    def tell(self, points: list[list[float]], costs: list[float]) -> None:
        with _Numpy(self):
            self._strategy.tell(self._points, costs)

    def reason(self) -> str:
        return f"CMA-ES converged ({', '.join(self._strategy.stop())})"


class _Numpy:
    """Context manager: numpy's global random numbers, which cma draws from, are the strategy's own in this block.

    So neither disturbs the other: a model or a task that draws between two generations changes no trial.
    """

    def __init__(self, owner: CmaEs) -> None:
        self._owner = owner
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> None:
        self._outer = np.random.get_state()
        if self._owner._random is not None:
            np.random.set_state(self._owner._random)
        self._warnings.__enter__()
        warnings.simplefilter("ignore")  # of its options' defaults, and of infinite costs

    def __exit__(self, *_: object) -> None:
        self._warnings.__exit__(None, None, None)
        self._owner._random = np.random.get_state()
        np.random.set_state(self._outer)


class LineSearch:
    """For one variable: a grid, then golden section between the neighbours of its best point, to 1/1000.

    CMA-ES learns nothing from a single dimension; a grid also finds the better of two minima.
    """

    def __init__(self) -> None:
        self._costs: dict[float, float] = {}
        self._bracket: tuple[float, float] | None = None

    def ask(self) -> list[list[float]]:
        if self._bracket is None:
            return [[number / (GRID - 1)] for number in range(GRID)]
        low, high = self._bracket
        while high - low > _PRECISION:
            left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
            missing = [each for each in (left, right) if self._cost(each) is None]
            if missing:
                return [missing[:1]]
            left_cost, right_cost = self._cost(left), self._cost(right)
            assert left_cost is not None  # nothing is missing
            assert right_cost is not None
            low, high = (low, right) if left_cost <= right_cost else (left, high)
            self._bracket = low, high
        return []

    def tell(self, points: list[list[float]], costs: list[float]) -> None:
        self._costs |= {point[0]: cost for point, cost in zip(points, costs)}
        if self._bracket is None:
            best = min(range(GRID), key=lambda number: costs[number])
            self._bracket = max(best - 1, 0) / (GRID - 1), min(best + 1, GRID - 1) / (GRID - 1)

    def reason(self) -> str:
        return f"the line search converged to {_PRECISION:g} of the bounds"

    def _cost(self, point: float) -> float | None:
        """The cost of a point that was evaluated; golden section comes back to its points but for rounding."""
        return next((cost for known, cost in self._costs.items() if abs(known - point) < 1e-9), None)
