"""Try once what this torch and this machine can do."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import TypeVar

Answer = TypeVar("Answer")


def probed(function: Callable[[], Answer]) -> Callable[[], Answer]:
    """Decorate a function that tries operations of torch: it runs once in a process, in a thread of its own.

    Contexts of torch belong to a thread. The first call may be within one that sees every operation: selective
    checkpointing would keep the results of the probe for those of the model, and torch.device("meta") would probe
    nothing. For torch.compile, decorate the result by torch.compiler.assume_constant_result.
    """
    answers: list[Answer] = []

    # not functools.cache: torch.compile traces what that wraps
    @wraps(function)
    def answer() -> Answer:
        if not answers:
            with ThreadPoolExecutor(1) as thread:
                answers.append(thread.submit(function).result())
        return answers[0]

    return answer
