"""Process groups of 2 and 4, started when a test first asks and kept for all that follow."""

from collections.abc import Callable, Iterator

import pytest

from tests.parallel.process_pool import ProcessPool


@pytest.fixture(scope="session")
def processes() -> Iterator[Callable[[int], ProcessPool]]:
    """processes(n) is the pool of n."""
    pools: dict[int, ProcessPool] = {}
    yield lambda world: pools.setdefault(world, ProcessPool(world))
    for pool in pools.values():
        pool.close()
