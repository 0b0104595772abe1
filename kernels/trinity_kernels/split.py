"""Split a fused projection into its parts, whose gradients are written into one tensor.

The backward of torch's split concatenates the gradients of the parts: each number is read and written once more. Here
an op that takes a part also takes the part's `GradientSlice`, and its backward writes the gradient where concatenation
would put it. The backward of the split copies only gradients that were computed elsewhere, and writes zeros for none.

When a slice is not used:
- The first use of a part whose backward asks for the slice gets it; another use computes its gradient elsewhere.
- If a slice was given out and is not what arrives for its part (a sum over several uses, what a hook returned, a slice
  of an earlier backward pass that ended before the split), all gradients are concatenated, into new memory.
- Without gradients, in a second derivative, under torch.compile, for fake and meta tensors: torch's split.
- On a CPU as well: backward of the smoke model's attention sublayer took 1 to 7 % longer with slices (2 busy cores).

With activation checkpointing the recomputed forward has slices that nobody asks for: backward runs the first graph.
Saved for backward: nothing. A gradient that is retained for a part is a view of the whole gradient.

Shapes: ... any leading dimensions, N width of the projection, the sum of its parts' widths.
"""

from typing import NamedTuple

import torch
from torch import Tensor

DEVICES: tuple[str, ...] = ("cuda",)
"""Types of device on which gradients are written into slices."""


class _WholeGradient:
    """The gradient [..., N] of a tensor that was split: a new tensor whenever the backward of the split has run."""

    def __init__(self, x: Tensor, widths: tuple[int, ...]) -> None:
        self._shape, self._dtype, self._device, self._widths = x.shape, x.dtype, x.device, widths
        self._whole: Tensor | None = None
        self._slices: tuple[Tensor, ...] = ()
        self._taken: set[int] = set()

    def take(self, part: int) -> Tensor | None:
        """The slice of a part, once; None if it is taken, or if the gradient is differentiated."""
        if torch.is_grad_enabled():
            return None
        self._allocate()
        if part in self._taken:
            return None
        self._taken.add(part)
        return self._slices[part]

    def complete(self, grads: tuple[Tensor | None, ...]) -> Tensor:
        """The whole gradient, from those of the parts; the slices that hold theirs are left as they are."""
        if torch.is_grad_enabled():
            return self._concatenate(grads)
        whole = self._allocate()
        slices, taken = self._slices, self._taken
        self._whole, self._slices, self._taken = None, (), set()
        if not all(_is_slice(grads[part], slices[part]) for part in taken):
            return self._concatenate(grads)  # into new memory, because a gradient may lie in another part's slice
        for part, grad in enumerate(grads):
            if grad is None:
                slices[part].zero_()
            elif part not in taken:
                slices[part].copy_(grad)
        return whole

    def _allocate(self) -> Tensor:
        if self._whole is None:
            self._whole = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._slices = self._whole.split_with_sizes(self._widths, dim=-1)
        return self._whole

    def _concatenate(self, grads: tuple[Tensor | None, ...]) -> Tensor:
        empty = torch.zeros((), dtype=self._dtype, device=self._device)
        parts = [
            empty.expand(*self._shape[:-1], width) if grad is None else grad
            for grad, width in zip(grads, self._widths)
        ]  # fmt: skip
        return torch.cat(parts, dim=-1)


def _is_slice(grad: Tensor | None, part: Tensor) -> bool:
    return grad is not None and grad.is_set_to(part)


class GradientSlice(NamedTuple):
    """Where the gradient of one part of a split tensor belongs; see split_projection."""

    whole: _WholeGradient
    part: int

    def take(self, shape: torch.Size) -> Tensor | None:
        """Memory for the gradient of a part that is viewed in this shape; None: allocate some. Call it in backward.

        What is returned is not initialised and must be written in full, and returned as the gradient.
        """
        memory = self.whole.take(self.part)
        return None if memory is None else memory.view(shape)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, widths: tuple[int, ...], whole: _WholeGradient) -> tuple[Tensor, ...]:
        ctx.whole = whole
        ctx.set_materialize_grads(False)
        return x.split_with_sizes(widths, dim=-1)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor, None, None]:
        return ctx.whole.complete(grads), None, None


def split_projection(x: Tensor, widths: tuple[int, ...]) -> tuple[tuple[Tensor, ...], tuple[GradientSlice | None, ...]]:
    """x.split(widths, dim=-1), and for each part the place of its gradient.

    Args:
        x: [..., N], any dtype; the parts must not be changed in place.
        widths: of the parts; they sum to N.
    Returns:
        the parts, views [..., width] of x; and their slices, for the argument `into` of an op that takes the part
        itself, whole, in any view with the same order of elements. None: the op allocates its gradient.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not _is_ordinary(x):
        return x.split_with_sizes(widths, dim=-1), (None,) * len(widths)
    whole = _WholeGradient(x, widths)
    return _Split.apply(x, widths, whole), tuple(GradientSlice(whole, part) for part in range(len(widths)))


def _is_ordinary(x: Tensor) -> bool:
    """Whether x needs a gradient and is data in the memory of such a device, not a fake or distributed tensor."""
    return x.requires_grad and type(x) is Tensor and x.device.type in DEVICES
