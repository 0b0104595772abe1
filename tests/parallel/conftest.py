"""Process pools of 2 and 4 ranks, started at their first use and kept for all tests that follow."""

from collections.abc import Callable, Iterator

import pytest

from tests.parallel.process_pool import ProcessPool


@pytest.fixture(scope="session")
def processes() -> Iterator[Callable[[int], ProcessPool]]:
    """processes(n): the pool of n ranks."""
    pools: dict[int, ProcessPool] = {}
    yield lambda world: pools.setdefault(world, ProcessPool(world))
    for pool in pools.values():
        pool.close()
