"""Muon for the matrices of the hidden layers, AdamW for the rest, learning-rate schedule, gradient clipping."""

from trinity.optim.build import Optimizers, build_optimizers, ownership_table
from trinity.optim.grad_clip import clip_, global_norm
from trinity.optim.lr_schedule import rate_scale
from trinity.optim.muon import Muon, rate_factor
from trinity.optim.newton_schulz import COEFFICIENTS, orthogonalize

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
