"""Trinity: pretraining of sparse Mixture-of-Experts models after the Arcee Trinity Large report (arXiv 2602.17004)."""

import os
import time

# Idle OpenMP threads sleep at once; it must be set before torch starts its threads. A step on a CPU is thousands of
# short operations: where another process wants a core too, spinning threads slow it several times (docs/speed.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

STARTED = time.monotonic()
"""Time at which this process first imported the package, before torch: the start time of a run counts from here."""
