"""Models of the ablations: each function takes a part of the architecture away from an initialised model, by hooks.

AfMoE cannot express these models, so each is marked (`Trinity.variant`), and its export is refused.

Shapes: B rows, S tokens, H heads, C head width.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import trinity_kernels
from trinity.models.attention import Attention
from trinity.models.layers import FusedPostNorm, FusedPreNorm, PostNorm, QKNorm, ResidualStream
from trinity.models.trinity import Trinity

OPEN = 40.0
"""σ(40) is 1 in fp32, and to 4e-18 in float64."""


@torch.no_grad()
def no_depth_scale(model: Trinity) -> None:
    """The gains after a sublayer begin at 1 in place of 1/√L. AfMoE can express this one."""
    for module in model.modules():
        if isinstance(module, FusedPostNorm | PostNorm):
            module.gain.fill_(1.0)


def no_post_norm(model: Trinity) -> None:
    """x + M(norm(x)): no norm after a sublayer."""

    def pre_norm(norm: FusedPreNorm, y: Tensor, x: Tensor, _post_gain: Tensor) -> tuple[Tensor, Tensor]:
        r = x + y
        return r, trinity_kernels.rms_norm(r, norm.gain, norm.eps)

    def post_norm(y: Tensor, residual: ResidualStream) -> Tensor:
        return residual.x + y

    for module in model.modules():
        if isinstance(module, FusedPreNorm):
            module.forward = partial(pre_norm, module)  # type: ignore[method-assign]
        elif isinstance(module, PostNorm):
            module.forward = post_norm  # type: ignore[method-assign]
    _mark(model, "no_post_norm")


def no_gate(model: Trinity) -> None:
    """The gate of attention is 1: its projection is replaced by a constant, and gets no gradient."""

    def open_gate(attention: Attention, _module: nn.Module, _inputs: object, qkvg: Tensor) -> Tensor:
        *parts, gate = qkvg.split(attention.qkvg.rows, dim=-1)
        return torch.cat((*parts, torch.full_like(gate, OPEN)), dim=-1)

    for module in model.modules():
        if isinstance(module, Attention):
            module.qkvg.register_forward_hook(partial(open_gate, module))
    _mark(model, "no_gate")


def no_qk_norm(model: Trinity) -> None:
    """RoPE on queries and keys as they are projected."""
    for module in model.modules():
        if isinstance(module, QKNorm):
            module.forward = _rope  # type: ignore[method-assign]
    _mark(model, "no_qk_norm")


def _rope(x_BSHC: Tensor, rotation: tuple[Tensor, Tensor] | None, _into: object = None) -> Tensor:
    """Rotate-half RoPE, differentiable; None: no positional encoding."""
    if rotation is None:
        return x_BSHC
    cos, sin = rotation
    first, second = x_BSHC.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BSHC.dtype)


def _mark(model: Trinity, name: str) -> None:
    model.variant = name


VARIANTS: dict[str, Callable[[Trinity], None]] = {
    function.__name__: function for function in (no_depth_scale, no_post_norm, no_gate, no_qk_norm)
}
