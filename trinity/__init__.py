"""Trinity: pretraining of sparse Mixture-of-Experts models after the Arcee Trinity Large report (arXiv 2602.17004)."""

import os

# Spinning OpenMP threads collapse torch on a shared machine; this must be set before torch starts its threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
