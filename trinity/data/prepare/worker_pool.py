"""Map a function over items in worker processes, with the results in the order of the items.

Each worker has its own pipe, which closes when the worker dies, so that its death is always noticed. A thread of the
worker receives items at once, so that the two sides never wait for each other; it ends the worker when the main process
dies. The main process sends a bounded number of items and of bytes ahead of the results it has yielded.
"""

import contextlib
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

from trinity.data.worker_process import CONTEXT, FORKS, exit_reason, start_worker
from trinity.errors import Failure, UserError

AHEAD = 4
"""Items per worker that are sent and not yet yielded."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(
    work: Callable[[Item], Result], items: Iterable[tuple[Item, int]], workers: int, size: int
) -> Iterator[Result]:
    """Yield work(item) for every item, in order.

    Args:
        work: called in the workers; without a fork it is pickled once.
        items: each with its size in bytes; consumed as results are taken.
        workers: number of processes, at least 1.
        size: an ordinary item's size; the bound in bytes is AHEAD · workers · size.
    Raises:
        UserError: raised by `work`, after the results before it.
        Failure: a worker was killed.
    """
    started = list(_start(work, workers))
    try:
        yield from _send_and_collect(items, started, AHEAD * workers, AHEAD * workers * size)
    finally:
        for process, _ in started:
            process.terminate()
        for process, pipe in started:
            process.join()
            pipe.close()


def _send_and_collect(
    items: Iterable[tuple[Item, int]], started: list[tuple[BaseProcess, Connection]], most: int, most_bytes: int
) -> Iterator[Any]:
    processes = {pipe: process for process, pipe in started}
    free = deque(list(processes) * AHEAD)
    ahead: deque[int] = deque()  # sizes of the items that are sent and not yet yielded
    results: dict[int, Any] = {}
    due = 0  # number of the next result
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
    ready = cast(list[Connection], wait(list(processes)))
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
        raise Failure(
            f"a worker process {exit_reason(process)}, perhaps for want of memory; "
            "run the same command again to continue, maybe with fewer --workers"
        ) from None


def _start(work: Callable, workers: int) -> Iterator[tuple[BaseProcess, Connection]]:
    """Start the workers; yields each with this side's end of its pipe."""
    pipes: list[Connection] = []
    # The tokenizers library reads this before every call; one thread per worker, because there is a worker per core.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C reaches all processes of a terminal; the main process alone handles it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        for _ in range(workers):
            pipe, worker_pipe = CONTEXT.Pipe()
            pipes.append(pipe)
            process = start_worker(_serve, (worker_pipe, work, pipes if FORKS else []), blocked=[signal.SIGINT])
            worker_pipe.close()
            yield process, pipe
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _serve(pipe: Connection, work: Callable, inherited: list[Connection]) -> None:
    """The main function of a worker process, which runs until it is terminated."""
    for end in inherited:
        end.close()  # otherwise a dead worker's pipe stays open in the others, and its death is not noticed
    tasks: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, tasks), daemon=True).start()
    while True:
        number, item = tasks.get()
        try:
            result: Any = work(item)
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
