"""Agreement among processes: one rank's error, result or flag reaches every rank."""

from collections.abc import Callable

import pytest
import torch.distributed as dist

from trinity.errors import Failure, UserError, explain
from trinity.parallel.collectives import all_reduce_max, errors_reach_all_ranks, run_on_all_ranks, run_on_rank0


def fail_on(rank: int, error: type[Exception], in_block: bool) -> tuple[str, str]:
    """Type and message of the error that this rank gets when `rank` raises."""

    def action() -> None:
        if dist.get_rank() == rank:
            raise error("a=1 is wrong; use 2")

    try:
        if in_block:
            with errors_reach_all_ranks():
                action()
        else:
            run_on_all_ranks(action)
    except Exception as raised:
        return type(raised).__name__, str(raised)
    return "", ""


@pytest.mark.parametrize("in_block", [False, True])
@pytest.mark.parametrize(
    ("rank", "error", "expected"),
    [
        (0, UserError, ("UserError", "a=1 is wrong; use 2")),
        (1, UserError, ("UserError", "rank 1: a=1 is wrong; use 2")),
        (1, Failure, ("Failure", "rank 1: a=1 is wrong; use 2")),
    ],
)
def test_one_ranks_error_is_raised_on_all(
    processes: Callable, rank: int, error: type, expected: tuple, in_block: bool
) -> None:
    """The same message on both ranks, and the exit code that the error has on its own rank."""
    assert processes(2).run(fail_on, rank, error, in_block) == [expected] * 2
    assert explain(error("x"))[0] == (2 if error is UserError else 1)


def results() -> tuple:
    """Results of the three functions on this rank."""
    rank = dist.get_rank()
    return (
        run_on_all_ranks(lambda: rank),
        run_on_rank0("from {}{end}".format, dist.get_rank(), end="."),
        all_reduce_max([rank, 5 - rank, 0]),
    )


def test_results(processes: Callable) -> None:
    """Each rank's own result; rank 0's on both; the maximum."""
    assert processes(2).run(results) == [(0, "from 0.", [1, 5, 0]), (1, "from 0.", [1, 5, 0])]


def test_without_a_process_group_the_block_just_runs() -> None:
    with errors_reach_all_ranks():
        ran = True
    assert ran
    with pytest.raises(OSError, match="full"), errors_reach_all_ranks():
        raise OSError("full")


def raise_assertion_on_rank0() -> str:
    def action() -> None:
        if dist.get_rank() == 0:
            raise AssertionError("ours")

    return run_on_rank0(action)


def test_assertions_are_raised_at_once_and_unwrapped(processes: Callable) -> None:
    """An assertion is raised as it is; the launcher ends the rank that waits."""
    from tests.parallel.process_pool import ProcessPool

    pool = ProcessPool(1)
    with pytest.raises(AssertionError, match="AssertionError: ours"):
        pool.run(raise_assertion_on_rank0)
    pool.close()
