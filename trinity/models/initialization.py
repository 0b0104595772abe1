"""Initial values: each depends only on the seed, the parameter's full name, the expert and the element's index.

So each rank computes only the elements it owns, and the bits are the same on every mesh of one device type. A
torch.Generator cannot start in the middle of a tensor; a counter hash can: splitmix64 of key + index gives 53 random
bits, and the inverse CDF of the normal distribution maps them to a normal number truncated at ±3σ (eq. 37-38), whose
standard deviation is 0.9866σ.
"""

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trinity.config.model import ModelConfig
from trinity.models.layers import Norm
from trinity.models.param_roles import parameter_roles

CUT = 3.0
"""Where the normal distribution is truncated, in σ (eq. 38)."""

_CHUNK = 2**22  # elements computed at once: 32 MB per temporary tensor


def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter and buffer of a Trinity model, sharded or not.

    Weights, router included: truncated normal, σ = 0.5/√d. Gains: the initial_gain of their norm. Expert bias and
    momentum: 0.
    """
    with torch.no_grad():
        # to_empty leaves garbage in buffers; NaN first, so that a buffer that is forgotten below is noticed
        for buffer in model.buffers():
            buffer.fill_(float("nan"))
        gains = {f"{name}.gain": norm.initial_gain for name, norm in model.named_modules() if isinstance(norm, Norm)}
        for role in parameter_roles(model):
            if role.kind == "gain":
                role.parameter.fill_(gains[role.name])
            else:
                _fill(role.parameter, role.name, seed, config.init_std, by_expert=role.kind == "experts")
        for buffer in model.buffers():
            buffer.zero_()


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
    """Map flat indices in the local part to flat indices in the whole tensor."""
    total, stride = torch.zeros_like(index), 1
    for size, whole, start in zip(reversed(local), reversed(shape), reversed(offset)):
        total += (index % size + start) * stride
        index = index // size
        stride *= whole
    return total


def truncated_normal(key: int, index: Tensor) -> Tensor:
    """Standard normal numbers truncated at ±CUT: the inverse CDF of a counter hash.

    Args:
        key: any signed 64-bit integer; each key gives an independent sequence.
        index: int64, any shape: positions in the sequence.
    Returns:
        float64, index's shape.
    """
    uniform = ((_shift(_splitmix64(key, index), 11)).double() + 0.5) * 2.0**-53
    low = 0.5 * math.erfc(CUT / math.sqrt(2))
    probability = low + uniform * (1 - 2 * low)
    return (math.sqrt(2) * torch.erfinv(2 * probability - 1)).clamp_(-CUT, CUT)


def _splitmix64(key: int, index: Tensor) -> Tensor:
    """Steele, Lea & Flood's splitmix64 (OOPSLA 2014) at counter key + index; int64 arithmetic must wrap around."""
    z = (index + 1) * _signed(0x9E3779B97F4A7C15) + key
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's >> keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
