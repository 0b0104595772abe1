"""Work spread over processes, with the results in the order of the work.

Each worker has a pipe of its own: one that dies, at whatever moment, ends its pipe, and that is noticed. A thread of
the worker takes what is sent at once, so that the two sides never wait for each other; when the main process dies it
ends the worker. The main process is ahead of the results it has handed on by a bounded number of items and of bytes.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from trinity.errors import Failure, UserError

AHEAD = 4
"""Items that are sent for each worker and not yet handed on."""

Item, Result = TypeVar("Item"), TypeVar("Result")


def in_processes(
    work: Callable[[Item], Result], items: Iterable[tuple[Item, int]], workers: int, size: int
) -> Iterator[Result]:
    """Yield work(item) for every item, in order.

    Args:
        work: called in the workers; without a fork it is pickled once.
        items: each with its size in bytes; read as far as results are taken.
        workers: how many processes, at least 1.
        size: an ordinary item's size; larger ones count for so many more.
    Raises:
        UserError: what `work` raised, once the results before are handed on.
        Failure: a worker was killed.
    """
    started = list(_start(work, workers))
    try:
        yield from _deal(items, started, AHEAD * workers, AHEAD * workers * size)
    finally:
        for process, _ in started:
            process.terminate()
        for process, pipe in started:
            process.join()
            pipe.close()


def _deal(
    items: Iterable[tuple[Item, int]], started: list[tuple[BaseProcess, Connection]], most: int, most_bytes: int
) -> Iterator[Any]:
    processes = {pipe: process for process, pipe in started}
    free = deque(list(processes) * AHEAD)
    ahead: deque[int] = deque()  # sizes of the items that are sent and not yet handed on
    results: dict[int, Any] = {}
    due = 0
    for number, (item, size) in enumerate(items):
        while ahead and (len(ahead) == most or sum(ahead) + size > most_bytes):
            if due not in results:
                free.extend(_collect(processes, results))
                continue
            yield _unwrapped(results.pop(due))
            due += 1
            ahead.popleft()
        pipe = free.popleft()
        with _alive(processes[pipe]):
            pipe.send((number, item))
        ahead.append(size)
    for number in range(due, due + len(ahead)):
        while number not in results:
            _collect(processes, results)
        yield _unwrapped(results.pop(number))


def _collect(processes: dict[Connection, BaseProcess], results: dict[int, Any]) -> list[Connection]:
    """Wait for results; returns the pipes they came from."""
    ready = wait(list(processes))
    for pipe in ready:
        with _alive(processes[pipe]):
            number, result = pipe.recv()
        results[number] = result
    return ready


def _unwrapped(result: Any) -> Any:
    if isinstance(result, UserError):
        raise result
    return result


@contextlib.contextmanager
def _alive(process: BaseProcess) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError):
        process.join(1)
        code = process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        raise Failure(
            f"a worker process {how}, perhaps for want of memory; "
            "run the same command again to go on, maybe with fewer --workers"
        ) from None


def _start(work: Callable, workers: int) -> Iterator[tuple[BaseProcess, Connection]]:
    """Start the workers; yields each with this side's end of its pipe."""
    # A fork takes no time and no second copy of what is imported; elsewhere than on Linux it is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    ours: list[Connection] = []
    # The tokenizers library asks before every call; one thread a worker, since there is a worker a core.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C reaches all processes of a terminal; the main one alone decides.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        for _ in range(workers):
            end, theirs = context.Pipe()
            ours.append(end)
            forked = ours if context.get_start_method() == "fork" else []
            process = context.Process(target=_serve, args=(theirs, work, forked), daemon=True)
            process.start()
            theirs.close()
            yield process, end
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _serve(pipe: Connection, work: Callable, forked: list[Connection]) -> None:
    """What a worker does until it is ended."""
    for end in forked:
        end.close()  # else a pipe would live as long as any worker, and its end would tell nothing
    tasks: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, tasks), daemon=True).start()
    while True:
        number, item = tasks.get()
        try:
            result = work(item)
        except UserError as error:
            result = error
        try:
            pipe.send((number, result))
        except OSError:
            os._exit(1)


def _listen(pipe: Connection, tasks: queue.SimpleQueue) -> None:
    try:
        while True:
            tasks.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(1)
