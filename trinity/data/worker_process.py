"""Start a worker process of the data loader or of prepare_data: a fork on Linux, spawned elsewhere.

A fork takes no time and shares imported modules; it is safe on Linux alone. The garbage of the parent must never be
collected in the child: a finalizer there would touch threads and connections that exist in the parent only (a dropped
process group ended forked workers with signal 11).
"""

import gc
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterable
from multiprocessing.process import BaseProcess
from typing import Any

FORKS = sys.platform == "linux"
CONTEXT = multiprocessing.get_context("fork") if FORKS else multiprocessing.get_context("spawn")


def start_worker(target: Callable[..., None], args: tuple[Any, ...], blocked: Iterable[signal.Signals]) -> BaseProcess:
    """Start `target(*args)` in a daemon process.

    Args:
        target: a function at the top of a module.
        args: pickled where the process is spawned.
        blocked: signals that the process does not receive: a terminal or a job system sends them to all processes, and
            the parent alone answers them.
    """
    process = CONTEXT.Process(target=_run, args=(target, args), daemon=True)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    collects = gc.isenabled()
    gc.disable()  # the child inherits it, until it has set its parent's objects aside
    try:
        process.start()
    finally:
        if collects:
            gc.enable()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return process


def _run(target: Callable[..., None], args: tuple[Any, ...]) -> None:
    gc.freeze()  # what exists now is the parent's, and is never collected here
    gc.enable()
    target(*args)


def exit_reason(process: BaseProcess) -> str:
    """How a process that has died ended, as the verb of a sentence."""
    process.join(1)
    code = process.exitcode
    return f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
