"""Processes decide together: one rank's mistake, result or signal reaches all of them."""

from collections.abc import Callable

import pytest
import torch.distributed as dist

from trinity.errors import Failure, UserError, explain
from trinity.parallel.collectives import all_reduce_max, run_on_all_ranks, run_on_rank0


def fail_on(rank: int, error: type[Exception]) -> tuple[str, str]:
    """What this rank sees of one rank's failure."""

    def action() -> None:
        if dist.get_rank() == rank:
            raise error("a=1 is wrong; use 2")

    try:
        run_on_all_ranks(action)
    except Exception as seen:
        return type(seen).__name__, str(seen)
    return "", ""


@pytest.mark.parametrize(
    ("rank", "error", "expected"),
    [
        (0, UserError, ("UserError", "a=1 is wrong; use 2")),
        (1, UserError, ("UserError", "rank 1: a=1 is wrong; use 2")),
        (1, Failure, ("Failure", "rank 1: a=1 is wrong; use 2")),
    ],
)
def test_one_ranks_failure_is_everyones(processes: Callable, rank: int, error: type, expected: tuple) -> None:
    """The same sentence on both, and the exit code that it has on the rank itself."""
    assert processes(2).run(fail_on, rank, error) == [expected] * 2
    assert explain(error("x"))[0] == (2 if error is UserError else 1)


def results() -> tuple:
    """Results of the three functions on this rank."""
    rank = dist.get_rank()
    return (
        run_on_all_ranks(lambda: rank),
        run_on_rank0(lambda: f"from {dist.get_rank()}"),
        all_reduce_max([rank, 5 - rank, 0]),
    )


def test_results(processes: Callable) -> None:
    """Each its own; rank 0's on both; the largest."""
    assert processes(2).run(results) == [(0, "from 0", [1, 5, 0]), (1, "from 0", [1, 5, 0])]


def _broken() -> str:
    def action() -> None:
        if dist.get_rank() == 0:
            raise AssertionError("ours")

    return run_on_rank0(action)


def test_our_own_mistakes_are_not_wrapped(processes: Callable) -> None:
    """An assertion leaves as it is; the rank that waits is ended by its launcher."""
    from tests.parallel.process_pool import ProcessPool

    pool = ProcessPool(1)
    with pytest.raises(AssertionError, match="AssertionError: ours"):
        pool.run(_broken)
    pool.close()
