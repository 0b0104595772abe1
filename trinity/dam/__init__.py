"""DAM, adaptive merging: learn by column, tensor or group how models are mixed (arXiv 2410.08371)."""

from trinity.dam.config import DamConfig, read_config
from trinity.dam.run import adaptive_merge

__all__ = ["DamConfig", "adaptive_merge", "read_config"]
