"""Record results in a forward pass and take them again in its recomputation, without computing them a second time.

Routing again in backward could choose other experts than forward did (a tie, another rounding). A dispatch mode can
keep the results of chosen operations (selective checkpointing), but it runs Python code for every operation of a block.
Here only the calls that must be kept are wrapped, in `kept`:

    results = Results()
    with results.recording():      # the forward pass
        y = f(x)
    with results.replaying():      # its recomputation: calls through `kept` return the recorded results, in order
        y = f(x)

The recorded tensors live as long as the Results object. A context applies to its thread alone, because backward may run
in another one.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


class _Call(NamedTuple):
    """One recorded call: its function, its result, and the versions of the result's tensors."""

    function: Callable[..., Any]
    result: Any
    versions: tuple[int, ...]


class Results:
    """The results of the calls through `kept` in one forward pass."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []

    def recording(self) -> "_Pass":
        """Context manager of the forward pass."""
        return _Pass(self._record)

    def replaying(self) -> "_Pass":
        """Context manager of a recomputation; it may run more than once."""
        return _Pass(self._replay)

    def _record(self, _place: int, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        result = function(*args, **kwargs)
        self._calls.append(_Call(function, result, _versions(result)))
        return result

    def _replay(self, place: int, function: Callable[..., Any], _args: tuple, _kwargs: dict[str, Any]) -> Any:
        call = self._calls[place] if place < len(self._calls) else None
        if call is None or call.function is not function:
            raise RuntimeError(f"call {place} of recomputation, of {function}, is not the one that forward recorded")
        if call.versions != _versions(call.result):
            raise RuntimeError(f"a result of {function} was changed in place between forward and recomputation")
        return call.result


class _Pass:
    """Context manager: calls through `kept` in this thread go to one function of Results, numbered from 0."""

    def __init__(self, handle: Callable[..., Any]) -> None:
        self._handle, self._place = handle, 0

    def __enter__(self) -> Self:
        self._place, self._outer, _current.active = 0, _current.active, self
        return self

    def __exit__(self, *_: object) -> None:
        _current.active = self._outer

    def call(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        place, self._place = self._place, self._place + 1
        return self._handle(place, function, args, kwargs)


class _Current(threading.local):
    active: _Pass | None = None


_current = _Current()


def kept(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs), or the recorded result of this call in a recomputation.

    Args:
        function: returns a tensor or a tuple of tensors without gradients. The same object in both passes.
    Raises:
        RuntimeError: recomputation calls other functions than forward did, or a recorded tensor has changed.
    """
    # a compiler traces the call; which results it keeps is its own decision (activation_checkpoint's policies)
    if torch.compiler.is_compiling() or _current.active is None:
        return function(*args, **kwargs)
    return _current.active.call(function, args, kwargs)


def _versions(result: Any) -> tuple[int, ...]:
    tensors = (result,) if isinstance(result, Tensor) else result
    return tuple(x._version for x in tensors if isinstance(x, Tensor))
