"""Bytes that are alive while tensors come and go, also of tensors without memory: the meta device's have sizes alone.

with LiveBytes() as live:
    y = model(x)
live.now, live.peak  # of what was made inside; what was there before is not counted
"""

import weakref
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the storage of every tensor that an operation makes, until nothing refers to it any more.

    Attributes:
        now: bytes alive, autograd's saved tensors among them. peak: the most there have been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {id(x.untyped_storage()) for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_iter(result):
            # a view of what was given is nothing new
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in given | self._known:
                self._add(x.untyped_storage())
        return result

    def _add(self, storage: UntypedStorage) -> None:
        size = storage.nbytes()
        self._known.add(id(storage))
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, id(storage), size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
