"""Detect straggler ranks by their attention time (attention_probe.py).

The detector's counts are in no checkpoint: after a restart a rank may run on another machine.
"""

import statistics
from typing import Any

PATIENCE = 3
"""Slow probes in a row before a warning; a single one may be another job on that machine. Not from the report."""


class StragglerDetector:
    """Counts, for each rank, the probes in a row in which it was slow.

    Args:
        factor: a rank is slow if it takes more than this many times the median; 0 turns the detector off.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._slow_probes_R: list[int] = []

    def update(self, seconds_R: list[float]) -> list[tuple[str, dict[str, Any]]]:
        """Take the attention seconds of one probe; return warnings, each a message and the fields of its event.

        A rank is warned about once, and again only after it recovered in between.
        """
        median = statistics.median_low(seconds_R)
        before_R = self._slow_probes_R or [0] * len(seconds_R)
        slow_R = [bool(self.factor) and seconds > self.factor * median for seconds in seconds_R]
        self._slow_probes_R = [(before + 1) * slow for before, slow in zip(before_R, slow_R)]
        warnings: list[tuple[str, dict[str, Any]]] = []
        for rank, probes in enumerate(self._slow_probes_R):
            if probes == PATIENCE:
                ratio = seconds_R[rank] / median
                message = f"rank {rank} has been slow in {PATIENCE} probes: attention takes {ratio:.1f} times as long"
                warnings.append((f"{message} on it as on the median rank", {"slow_rank": rank, "ratio": ratio}))
        return warnings
