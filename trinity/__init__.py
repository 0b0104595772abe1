"""Trinity: pretraining of sparse Mixture-of-Experts models after the Arcee Trinity Large report (arXiv 2602.17004)."""

import os
import time

# How long libgomp's idle threads spin before they sleep; it must be set before torch starts its threads. A step on a
# CPU is thousands of short operations: threads that sleep at once (OMP_WAIT_POLICY=PASSIVE) made it a third slower, and
# with the default, three times as long, several processes on the same cores slow each other down.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")

STARTED = time.monotonic()
"""Time at which this process first imported the package, before torch: the start time of a run counts from here."""
