"""Which tests start processes, found from their code and their fixtures', so that nobody has to mark them by hand.

A test counts if it, a fixture that it uses, or a helper of the tests that one of them calls mentions subprocess or
multiprocessing, or a context of the latter. Processes that the package itself starts (data workers) are not seen.
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
    fixtures = [made.func for known in item._fixtureinfo.name2fixturedefs.values() for made in known]
    seen: set[int] = set()
    return any(leads_to_a_process(function, seen) for function in (item.function, *fixtures))


def leads_to_a_process(value: Any, seen: set[int] | None = None) -> bool:
    """Whether something that a test's code mentions is, or mentions in turn, what starts a process.

    Args:
        value: anything; functions and classes of the tests are looked into.
        seen: ids of those already looked into, without a find.
    """
    seen = set() if seen is None else seen
    if inspect.ismodule(value):
        return value in (subprocess, multiprocessing)
    if isinstance(value, BaseContext) or str(getattr(value, "__module__", None)).split(".")[0] in STARTERS:
        return True
    if id(value) in seen or not (inspect.isfunction(value) or inspect.isclass(value)) or not _is_of_tests(value):
        return False
    seen.add(id(value))
    mentioned = vars(value).values() if inspect.isclass(value) else _mentioned(value)
    return any(leads_to_a_process(one, seen) for one in mentioned)


def _is_of_tests(value: Any) -> bool:
    module = inspect.getmodule(value)
    return Path(getattr(module, "__file__", None) or "/").is_relative_to(TESTS)


def _mentioned(function: Any) -> Iterator[Any]:
    """What the names in a function's code stand for; of a module of the tests, the attributes of these names too."""
    function = inspect.unwrap(function)  # of a context manager, the generator
    names = set(_names(function.__code__))
    for name in names:
        value = function.__globals__.get(name)
        yield value
        if inspect.ismodule(value) and Path(getattr(value, "__file__", None) or "/").is_relative_to(TESTS):
            yield from (vars(value)[attribute] for attribute in names & vars(value).keys())


def _names(code: CodeType) -> Iterator[str]:
    """The global names and attributes that code mentions, in functions inside of it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
