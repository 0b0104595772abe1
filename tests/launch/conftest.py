"""A run directory whose processes are killed after the test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.local_nodes import end_all


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """The run directory, for `local_nodes.start`."""
    yield tmp_path
    end_all(tmp_path)
