"""Detect loss spikes by the rule that OLMo publishes.

A step is a spike if its loss or gradient norm exceeds the mean of the last `window` ordinary steps by more than `sigma`
of their standard deviations. The first half window raises none. Steps that spike do not enter the window.
"""

import math

import torch
from torch import Tensor

CAPACITY = 1024
"""The longest window allowed: the state has the same shape for every window."""


class SpikeDetector:
    """Remembers the losses and gradient norms of the last ordinary steps.

    Args:
        window: the number of steps; at most CAPACITY.
        sigma: a value more than this many standard deviations above the mean is a spike.
    """

    def __init__(self, window: int, sigma: float) -> None:
        assert 2 <= window <= CAPACITY
        self.window, self.sigma = window, sigma
        self._ordinary: list[tuple[float, float]] = []

    def detect(self, loss: float, grad_norm: float) -> str | None:
        """Describe a spike as a clause with its numbers; return None for an ordinary step, and remember the step.

        Args:
            loss, grad_norm: of one step, both finite.
        """
        for name, value, past in zip(("loss", "gradient norm"), (loss, grad_norm), zip(*self._ordinary)):
            if len(past) < self.window // 2:
                break
            mean = math.fsum(past) / len(past)
            deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in past) / len(past))
            if value > mean + self.sigma * deviation:
                return f"{name} {value:.4g} stands {_in_deviations(value - mean, deviation)} above the mean {mean:.4g}"
        self._ordinary = [*self._ordinary, (loss, grad_norm)][-self.window :]
        return None

    def state(self) -> Tensor:
        """[2, CAPACITY] float64: losses and norms of the last ordinary steps, newest last; ∞ in unused places."""
        state = torch.full((2, CAPACITY), math.inf, dtype=torch.float64)
        if self._ordinary:
            state[:, -len(self._ordinary) :] = torch.tensor(self._ordinary, dtype=torch.float64).T
        return state

    def restore(self, state: Tensor) -> None:
        """Restore what state() returned; a shorter window drops the oldest steps."""
        used = state[:, state[0].isfinite()].T
        self._ordinary = [(loss, norm) for loss, norm in used.tolist()][-self.window :]


def _in_deviations(distance: float, deviation: float) -> str:
    return f"{distance / deviation:.1f} standard deviations" if deviation else "any number of standard deviations"
