"""Trinity: pretraining of sparse Mixture-of-Experts models after the Arcee Trinity Large report (arXiv 2602.17004)."""

import os
import time

# How long idle OpenMP threads spin before they sleep; it must be set before torch is loaded. A step on a CPU is
# thousands of short operations, each with a barrier. Threads that sleep at once pay tens of microseconds for each;
# threads that spin for milliseconds slow a step several times where another process wants a core too. GNU's OpenMP,
# which torch has on Linux, spins 3000 times, about 0.1 ms; others sleep at once (docs/speed.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

STARTED = time.monotonic()
"""Time at which this process first imported the package, before torch: the start time of a run counts from here."""
