"""What an operation of this package is: one name, several implementations, one rule that picks."""

from collections.abc import Callable
from typing import Any


class Op:
    """An operation with its torch reference, and (once it has one) a Triton implementation.

    Calling it picks: today that is always the reference, the only implementation there is.
    """

    def __init__(self, reference: Callable[..., Any]) -> None:
        self.reference = reference
        self.__doc__ = reference.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.reference(*args, **kwargs)
