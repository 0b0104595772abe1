"""Loss spikes, by the rule that OLMo publishes: a step whose loss or gradient norm stands too far above the last ones.

A value is a spike where it exceeds the mean of the last `window` ordinary steps by more than `sigma` of their standard
deviations; the first half window raises none. Steps that spike do not enter the window.
"""

import math

import torch
from torch import Tensor

CAPACITY = 1024
"""The longest window that can be asked for: the state has one shape for all."""


class SpikeDetector:
    """Remembers the last ordinary steps.

    Args:
        window: how many; at most CAPACITY.
        sigma: standard deviations above the mean from which on a value is a spike.
    """

    def __init__(self, window: int, sigma: float) -> None:
        assert 2 <= window <= CAPACITY
        self.window, self.sigma = window, sigma
        self._past: list[tuple[float, float]] = []

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """What is out of the ordinary, as a clause with its figures; None, and remembered, where nothing is.

        Args:
            loss, grad_norm: of one step, both finite.
        """
        for name, value, past in zip(("loss", "gradient norm"), (loss, grad_norm), zip(*self._past)):
            if len(past) < self.window // 2:
                break
            mean = math.fsum(past) / len(past)
            deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in past) / len(past))
            if value > mean + self.sigma * deviation:
                return f"{name} {value:.4g} stands {_times(value - mean, deviation)} above the mean {mean:.4g}"
        self._past = [*self._past, (loss, grad_norm)][-self.window :]
        return None

    def state(self) -> Tensor:
        """[2, CAPACITY] float64: losses and norms of the last ordinary steps, newest last; ∞ where there is none."""
        state = torch.full((2, CAPACITY), math.inf, dtype=torch.float64)
        if self._past:
            state[:, -len(self._past) :] = torch.tensor(self._past, dtype=torch.float64).T
        return state

    def restore(self, state: Tensor) -> None:
        """Remember what state() held; a shorter window forgets the oldest."""
        known = state[:, state[0].isfinite()].T
        self._past = [(loss, norm) for loss, norm in known.tolist()][-self.window :]


def _times(distance: float, deviation: float) -> str:
    return f"{distance / deviation:.1f} standard deviations" if deviation else "any number of standard deviations"
