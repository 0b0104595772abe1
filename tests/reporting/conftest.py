"""The run directory that most tests of the report read."""

from pathlib import Path

import pytest

from tests.reporting.run_files import full_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with every file."""
    return full_run(tmp_path / "run")
