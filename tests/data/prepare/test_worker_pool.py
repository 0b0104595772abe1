"""Worker processes: results in order, errors after the results before them, and no worker outlives the main process."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trinity.data.prepare.worker_pool import AHEAD, map_in_processes
from trinity.errors import Failure, UserError

FORK = multiprocessing.get_context("fork")


def run(work: Callable, count: int, workers: int, size: int = 1) -> Iterator:
    return map_in_processes(work, ((number, 1) for number in range(count)), workers, size)


def slow_at_first(number: int) -> tuple[int, int]:
    time.sleep(0.03 if number % 5 == 0 else 0)
    return number, os.getpid()


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_results_come_in_order(workers: int, count: int) -> None:
    results = list(run(slow_at_first, count, workers))
    assert [number for number, _ in results] == list(range(count))
    assert len({process for _, process in results}) == min(workers, count)


def test_large_items_and_results_pass_at_once() -> None:
    """A megabyte is more than a pipe holds: neither side may wait for the other to read."""
    items = ((bytes([number]) * (1 << 20), 1 << 20) for number in range(30))
    results = map_in_processes(bytes.upper, items, 2, 1 << 20)
    assert [result[:1] for result in results] == [bytes([number]).upper() for number in range(30)]


@pytest.mark.parametrize(("size", "most"), [(10, 2 * AHEAD), (10 * 2 * AHEAD, 1)])
def test_items_sent_ahead_are_bounded(size: int, most: int) -> None:
    """Items of the ordinary 10 bytes; and items as large as all that two workers may have ahead."""
    read = 0

    def items() -> Iterator[tuple[int, int]]:
        nonlocal read
        for read in range(1, 41):
            yield -read, size

    results = map_in_processes(abs, items(), 2, 10)
    for taken in range(1, 31):
        assert next(results) == taken
        assert read - taken <= most
    results.close()


def refuse_seven(number: int) -> int:
    if number == 7:
        raise UserError("seven is refused")
    return number


def test_an_error_comes_after_the_results_before_it() -> None:
    results = []
    with pytest.raises(UserError, match="seven is refused"):
        results.extend(run(refuse_seven, 30, 3))
    results = run(refuse_seven, 30, 3)
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(UserError):
        next(results)


def kill_itself(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [1, 3])
def test_a_killed_worker_is_reported_in_one_sentence(workers: int) -> None:
    with pytest.raises(Failure, match="a worker process was killed by signal 9, perhaps for want of memory"):
        list(run(kill_itself, 100, workers))
    assert not multiprocessing.active_children()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def nap(number: int) -> int:
    time.sleep(0.02)
    return number


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's list of a process's children")
def test_workers_end_with_the_main_process() -> None:
    main = FORK.Process(target=lambda: list(run(nap, 10_000, 3)))
    main.start()
    while len(workers := children(main.pid)) < 3:
        time.sleep(0.01)
    os.kill(main.pid, signal.SIGKILL)
    main.join()
    deadline = time.monotonic() + 5
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_running, workers))


def test_workers_leave_interrupts_to_the_main_process() -> None:
    """SIGINT to every process of the group, as a terminal sends on Ctrl-C."""

    def interrupted() -> None:
        os.setpgrp()
        try:
            for number in run(nap, 10_000, 2):
                if number == 3:
                    os.killpg(0, signal.SIGINT)
        except KeyboardInterrupt:
            os._exit(7 if not multiprocessing.active_children() else 8)

    main = FORK.Process(target=interrupted)
    main.start()
    main.join(10)
    assert main.exitcode == 7


def test_the_environment_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("true", None):
        if value is None:
            monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        else:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
        assert set(run(lambda _: os.environ["TOKENIZERS_PARALLELISM"], 4, 2)) == {"false"}
        assert os.environ.get("TOKENIZERS_PARALLELISM") == value
