"""Process pools of 2 and 4 ranks, started at their first use and kept for all tests of this folder.

Not for the whole session: the threads of gloo's process groups poll, which with 51 groups took 4 % of a core for each
idle rank.
"""

from collections.abc import Callable, Iterator
from functools import cache

import pytest

from tests.parallel.process_pool import ProcessPool
from tests.parallel.saving_runs import MESH, WORDS, bytes_by_step, on_ranks, plain_run
from trinity.checkpoint.directory import CheckpointDirectory


@pytest.fixture(scope="package")
def processes() -> Iterator[Callable[[int], ProcessPool]]:
    """processes(n): the pool of n ranks."""
    pools: dict[int, ProcessPool] = {}
    yield lambda world: pools.setdefault(world, ProcessPool(world))
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="package")
def synchronous_checkpoints(
    recipe: Callable, processes: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], dict[int, dict[str, bytes]]]:
    """synchronous_checkpoints(n): the tensors by step of a run of n processes that waits for each of its saves."""

    @cache
    def tensors(world: int) -> dict[int, dict[str, bytes]]:
        run = tmp_path_factory.mktemp("synchronous") / "run"
        words = [*WORDS, *MESH[world], "checkpoint.asynchronous=false"]
        assert on_ranks(processes, world, plain_run, recipe(run), words) == [0] * world
        return bytes_by_step(CheckpointDirectory.at(run))

    return tensors
