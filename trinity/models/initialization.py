"""Initial values: each a function of (seed, the parameter's full name, its expert, its index), of nothing else.

So every rank makes just what it owns, and the bits are the same on every mesh of one device type. A torch.Generator
can't start in the middle of a tensor; a counter hash can: splitmix64 of key + index gives 53 random bits, the inverse
of the normal distribution's CDF turns them into a normal number cut at ±3σ (eq. 37-38), of standard deviation 0.9866σ.
"""

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trinity.config.model import ModelConfig
from trinity.models.param_roles import parameter_roles

CUT = 3.0
"""Where the normal distribution is cut, in σ (eq. 38)."""

_CHUNK = 2**22  # elements made at once: 32 MB a temporary


def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter and buffer of a Trinity model, sharded or not.

    Weights: truncated normal, σ = 0.5/√d, router included. Gains: what their norm says. Expert bias and momentum: 0.
    """
    with torch.no_grad():
        # to_empty leaves garbage in buffers: poison first, so that one forgotten here shows
        for buffer in model.buffers():
            buffer.fill_(float("nan"))
        gains = {f"{name}.gain": module.initial_gain for name, module in model.named_modules() if _is_norm(module)}
        for role in parameter_roles(model):
            if role.kind == "gain":
                role.parameter.fill_(gains[role.name])
            else:
                _fill(role.parameter, role.name, seed, config.init_std, by_expert=role.kind == "experts")
        for buffer in model.buffers():
            buffer.zero_()


def _is_norm(module: nn.Module) -> bool:
    return hasattr(module, "initial_gain")


def _fill(parameter: Tensor, name: str, seed: int, std: float, by_expert: bool) -> None:
    local, shape, offset = parameter, parameter.shape, (0,) * parameter.dim()
    if isinstance(parameter, DTensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        _, offset = compute_local_shape_and_global_offset(shape, parameter.device_mesh, parameter.placements)
        local = parameter.to_local()
    if not by_expert:
        _fill_block(local, shape, offset, _key(seed, name), std)
        return
    for index in range(local.shape[0]):
        key = _key(seed, f"{name}[{offset[0] + index}]")
        _fill_block(local[index], shape[1:], offset[1:], key, std)


def _key(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _fill_block(local: Tensor, shape: tuple[int, ...], offset: tuple[int, ...], key: int, std: float) -> None:
    """Fill `local`, the part of a tensor of `shape` that starts at `offset`."""
    if not local.numel():
        return
    flat = local.view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        piece = flat[start : start + _CHUNK]
        index = torch.arange(start, start + piece.numel(), device=local.device)
        piece.copy_(truncated_normal(key, _global_index(index, local.shape, shape, offset)) * std)


def _global_index(index: Tensor, local: tuple[int, ...], shape: tuple[int, ...], offset: tuple[int, ...]) -> Tensor:
    """Flat indices in the part → flat indices in the whole tensor."""
    total, stride = torch.zeros_like(index), 1
    for size, whole, start in zip(reversed(local), reversed(shape), reversed(offset)):
        total += (index % size + start) * stride
        index = index // size
        stride *= whole
    return total


def truncated_normal(key: int, index: Tensor) -> Tensor:
    """Normal numbers of standard deviation 1 before the cut at ±CUT, by inverse CDF of a counter hash.

    Args:
        key: any signed 64-bit integer; another key gives another, independent sequence.
        index: int64, any shape: which numbers of the sequence.
    Returns:
        float64, index's shape.
    """
    uniform = ((_shift(_splitmix64(key, index), 11)).double() + 0.5) * 2.0**-53
    low = 0.5 * math.erfc(CUT / math.sqrt(2))
    probability = low + uniform * (1 - 2 * low)
    return (math.sqrt(2) * torch.erfinv(2 * probability - 1)).clamp_(-CUT, CUT)


def _splitmix64(key: int, index: Tensor) -> Tensor:
    """Steele, Lea & Flood's splitmix64 (OOPSLA 2014) at counter key + index; int64 arithmetic wraps, as it must."""
    z = (index + 1) * _signed(0x9E3779B97F4A7C15) + key
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
