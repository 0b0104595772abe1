"""The mark `processes`, by which `make quick` leaves tests out, is set where a test's code or fixtures start one."""

import multiprocessing
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.starts_processes import leads_to_a_process


def direct() -> None:
    subprocess.run(["true"])


def inside() -> Callable:
    return lambda: multiprocessing.get_context("fork")


@contextmanager
def wrapped() -> Iterator[None]:
    direct()
    yield


class Holder:
    def start(self) -> None:
        inside()


def through_helpers() -> None:
    with wrapped():
        pass


def through_a_class() -> Holder:
    return Holder()


def harmless() -> str:
    return repr(pytest.approx(1.0))


@pytest.mark.parametrize("function", [direct, inside, through_helpers, through_a_class])
def test_code_that_starts_processes(function: Callable) -> None:
    assert leads_to_a_process(function)


def test_code_that_does_not() -> None:
    assert not leads_to_a_process(harmless)


def test_a_fixture_counts(run_command: Callable, request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("processes")


def test_without_one_there_is_no_mark(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("processes") is None
