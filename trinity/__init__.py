"""Trinity: pretraining of sparse Mixture-of-Experts models after the Arcee Trinity Large report (arXiv 2602.17004)."""

import os
import time

# Spinning OpenMP threads collapse torch on a shared machine; this must be set before torch starts its threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

STARTED = time.monotonic()
"""Time at which this process first imported the package, before torch: the start time of a run counts from here."""
