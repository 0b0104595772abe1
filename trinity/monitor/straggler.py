"""Which rank is slow, by the seconds that attention takes on each (probe.py).

What it has counted is in no checkpoint: after a restart a rank may be on another machine.
"""

import statistics

TIMES = 3
"""Probes in a row before a warning: one slow probe is somebody else's job on that machine. Ours."""


class StragglerDetector:
    """Watches how long each rank takes.

    Args:
        factor: a rank is slow where it takes so many times the median; 0 warns of none.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._slow_R: list[int] = []

    def look(self, seconds_R: list[float]) -> list[tuple[str, dict]]:
        """Take one probe; what is to be warned of, as sentences with their figures.

        A rank is warned of once, and again only after it was well in between.
        """
        usual = statistics.median_low(seconds_R)
        before_R = self._slow_R or [0] * len(seconds_R)
        slow_R = [bool(self.factor) and seconds > self.factor * usual for seconds in seconds_R]
        self._slow_R = [(before + 1) * slow for before, slow in zip(before_R, slow_R)]
        found = []
        for rank, times in enumerate(self._slow_R):
            if times == TIMES:
                ratio = seconds_R[rank] / usual
                text = f"rank {rank} has been slow in {TIMES} probes: attention takes {ratio:.1f} times as long on it"
                found.append((f"{text} as on the median rank", {"slow_rank": rank, "ratio": ratio}))
        return found
