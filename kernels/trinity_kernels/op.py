"""What an operation of this package is: one name, several implementations, one rule that picks.

op(…)             picks: Triton on a CUDA device, where it takes such arguments; else the torch reference
op(…, kernel=…)   "triton" or "reference" forces one; "auto" is the rule above
op.reference(…)   torch, on every device and in every floating point
op.triton(…)      Triton: on a CUDA device, or anywhere under its interpreter (TRITON_INTERPRET=1)
"""

import os
from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from typing import Any

from torch import Tensor


class Op:
    """An operation with its torch reference and, where it has one, a Triton implementation.

    Args:
        reference: the torch one; its docstring is the operation's.
        triton: "module:function" with the same arguments; imported when it first runs, as nothing else needs Triton.
        refuses: from the same arguments, why Triton cannot take them, or None. The device is not its business.
    """

    def __init__(
        self,
        reference: Callable[..., Any],
        triton: str | None = None,
        refuses: Callable[..., str | None] | None = None,
    ) -> None:
        self.reference = reference
        self.__doc__ = reference.__doc__
        self._triton, self._refuses = triton, refuses

    def __call__(self, *args: Any, kernel: str = "auto", **kwargs: Any) -> Any:
        if kernel == "reference" or self._triton is None:
            return self.reference(*args, **kwargs)
        why_not = self.refusal(kernel, *args, **kwargs)
        if kernel == "triton" and why_not:
            raise ValueError(f"kernel=triton cannot be used: {why_not}; use auto or reference")
        return (self.reference if why_not else self.triton)(*args, **kwargs)

    @cached_property
    def triton(self) -> Callable[..., Any]:
        """The Triton implementation."""
        module, function = self._triton.split(":")
        return getattr(import_module(module), function)

    def refusal(self, kernel: str, *args: Any, **kwargs: Any) -> str | None:
        """Why Triton does not compute this call, asked for by "triton" or "auto"; None if it does."""
        device = next(x for x in args if isinstance(x, Tensor)).device.type
        if device != "cuda" and not (kernel == "triton" and interpreted()):
            return f"it needs an NVIDIA GPU and the tensors are on the {device}"
        return self._refuses(*args, **kwargs) if self._refuses else None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on any device, slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
