"""Find the tests that start processes from their code and their fixtures' code, so that they need no mark by hand.

A test starts processes if its code, the code of its fixtures, or of the tests' helpers that these call refers to
subprocess, multiprocessing or a multiprocessing context. Processes started by the package (data workers) do not count.
"""

import inspect
import multiprocessing
import subprocess
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

TESTS = Path(__file__).parent
STARTERS = ("subprocess", "multiprocessing")


def starts_processes(item: pytest.Function) -> bool:
    """Whether a collected test starts processes."""
    fixtures = [fixture.func for group in item._fixtureinfo.name2fixturedefs.values() for fixture in group]
    visited: set[int] = set()
    return any(leads_to_a_process(function, visited) for function in (item.function, *fixtures))


def leads_to_a_process(value: Any, visited: set[int] | None = None) -> bool:
    """Whether a value that a test's code refers to starts a process, directly or through what it refers to.

    Args:
        value: any object; functions and classes of the tests are searched.
        seen: ids of functions and classes that were searched before.
    """
    visited = set() if visited is None else visited
    if inspect.ismodule(value):
        return value in (subprocess, multiprocessing)
    if isinstance(value, BaseContext) or str(getattr(value, "__module__", None)).split(".")[0] in STARTERS:
        return True
    if id(value) in visited or not (inspect.isfunction(value) or inspect.isclass(value)) or not _is_of_tests(value):
        return False
    visited.add(id(value))
    references = vars(value).values() if inspect.isclass(value) else _references(value)
    return any(leads_to_a_process(reference, visited) for reference in references)


def _is_of_tests(value: Any) -> bool:
    module = inspect.getmodule(value)
    return Path(getattr(module, "__file__", None) or "/").is_relative_to(TESTS)


def _references(function: Any) -> Iterator[Any]:
    """The objects that a function's code refers to, and those that it names in modules of the tests."""
    function = inspect.unwrap(function)  # the generator of a context manager
    names = set(_names(function.__code__))
    for name in names:
        value = function.__globals__.get(name)
        yield value
        if inspect.ismodule(value) and Path(getattr(value, "__file__", None) or "/").is_relative_to(TESTS):
            yield from (vars(value)[attribute] for attribute in names & vars(value).keys())


def _names(code: CodeType) -> Iterator[str]:
    """The global names and attributes in code, nested functions included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
