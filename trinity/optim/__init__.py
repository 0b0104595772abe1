"""Muon for the hidden matrices, AdamW for the rest, the learning-rate schedule and gradient clipping."""

from trinity.optim.clip import clip_, global_norm
from trinity.optim.groups import Optimizers, build_optimizers, ownership_table
from trinity.optim.muon import Muon, rate_factor
from trinity.optim.newton_schulz import COEFFICIENTS, orthogonalize
from trinity.optim.schedule import rate_scale

__all__ = [
    "COEFFICIENTS",
    "Muon",
    "Optimizers",
    "build_optimizers",
    "clip_",
    "global_norm",
    "orthogonalize",
    "ownership_table",
    "rate_factor",
    "rate_scale",
]
