"""Op: one operation with several implementations and one rule that picks.

op(…)             Triton on a CUDA device if it supports the arguments; otherwise the torch reference
op(…, kernel=…)   "triton" or "reference" forces one; "auto" is the rule above
op.reference(…)   torch, on every device and in every floating-point dtype
op.triton(…)      Triton: on a CUDA device, or on any device under its interpreter (TRITON_INTERPRET=1)
"""

import os
from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from typing import Any

from torch import Tensor

from trinity_kernels.replay import kept


class Op:
    """An operation with its torch reference and, where it has one, a Triton implementation.

    Args:
        reference: the torch implementation; its docstring becomes the operation's.
        triton: "module:function" with the same arguments; imported at the first call, because only it needs Triton.
        refuses: takes the same arguments; returns why Triton does not support them, or None. Op checks the device.
        replayed: recomputation of a forward pass takes the results of that pass again; they have no gradient.
    """

    def __init__(
        self,
        reference: Callable[..., Any],
        triton: str | None = None,
        refuses: Callable[..., str | None] | None = None,
        replayed: bool = False,
    ) -> None:
        self.reference = reference
        self.__doc__ = reference.__doc__
        self._triton, self._refuses, self._replayed = triton, refuses, replayed

    def __call__(self, *args: Any, kernel: str = "auto", **kwargs: Any) -> Any:
        function = self._pick(kernel, args, kwargs)
        return kept(function, *args, **kwargs) if self._replayed else function(*args, **kwargs)

    def _pick(self, kernel: str, args: tuple, kwargs: dict[str, Any]) -> Callable[..., Any]:
        if kernel == "reference" or self._triton is None:
            return self.reference
        reason = self.refusal(kernel, *args, **kwargs)
        if kernel == "triton" and reason:
            raise ValueError(f"kernel=triton cannot be used: {reason}; use auto or reference")
        return self.reference if reason else self.triton

    @property
    def has_triton(self) -> bool:
        """Whether the operation has a Triton implementation; `triton` imports it."""
        return self._triton is not None

    @cached_property
    def triton(self) -> Callable[..., Any]:
        """The Triton implementation.

        Raises:
            AttributeError: the operation has none.
        """
        if self._triton is None:
            raise AttributeError("this operation has no Triton implementation")
        module, function = self._triton.split(":")
        return getattr(import_module(module), function)

    def refusal(self, kernel: str, *args: Any, **kwargs: Any) -> str | None:
        """Why Triton does not compute this call with kernel "triton" or "auto"; None if it does."""
        x = args[0] if isinstance(args[0], Tensor) else next(x for x in args if isinstance(x, Tensor))
        # is_cuda, because reading x.device.type at every call takes 15 times as long
        if not x.is_cuda and not (kernel == "triton" and interpreted()):
            return f"it needs an NVIDIA GPU and the tensors are on the {x.device.type}"
        return self._refuses(*args, **kwargs) if self._refuses else None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter: slow, on any device, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
