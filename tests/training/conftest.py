"""Undisturbed runs, made once for all tests that compare with them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.forked_ranks import run


@pytest.fixture(scope="session")
def undisturbed(
    recipe: Callable, uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """undisturbed(world) is the directory of a run on `world` processes."""
    runs: dict[int, Path] = {1: uninterrupted}

    def make(world: int) -> Path:
        if world not in runs:
            runs[world] = tmp_path_factory.mktemp("undisturbed") / "run"
            assert run(recipe(runs[world]), world=world) == [0] * world
        return runs[world]

    return make
