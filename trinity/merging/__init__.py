"""Merge and average checkpoints."""
