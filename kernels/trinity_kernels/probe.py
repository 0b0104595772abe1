"""Try once what this torch and this machine can do."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

Answer = TypeVar("Answer")


def probed(function: Callable[[], Answer]) -> Callable[[], Answer]:
    """Decorate a function that tries operations of torch: it runs once in a process, in a thread of its own.

    Contexts of torch belong to a thread. The first call may be within one that sees every operation: selective
    checkpointing would keep the results of the probe for those of the model, and torch.device("meta") would probe
    nothing.
    """

    @cache
    def answer() -> Answer:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(function).result()

    answer.__doc__ = function.__doc__
    return answer
