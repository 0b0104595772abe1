"""Merge models, and average the checkpoints of a run."""

from trinity.merging.merge import merge

__all__ = ["merge"]
