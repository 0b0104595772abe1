"""Parameters of merge methods: their types, and their values by tensor, from a recipe's gradients, filters and scopes.

A value is a number, true or false, or a word; or a list of numbers, a gradient over the layers of a slice; or a list
of {filter, value}: the first whose `filter` is part of the tensor's name counts, and "*" is part of every name. If no
filter matches, the next wider scope is asked. From narrow to wide: rule, model (or source of a slice), slice, recipe.
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from trinity.errors import UserError

Scope = dict[str, Any]
"""Parameter → value as written, checked by `check_value`."""


LARGEST = 1e15
"""Of a number: fp32 holds the product of two, so that no method overflows by its parameters alone."""


@dataclass(frozen=True)
class Parameter:
    """The type of a parameter: a number within bounds, an integer, true or false (bool), or one of some words."""

    kind: type = float
    low: float = -LARGEST
    high: float = LARGEST
    words: tuple[tuple[Any, str], ...] = ()

    def read(self, value: Any, where: str) -> Any:
        """The value in the parameter's type.

        Raises:
            UserError: it is of another type or out of bounds.
        """
        if self.words:
            return self._word(value, where)
        if self.kind is bool:
            if isinstance(value, bool):
                return value
            raise UserError(f"{where} is {value!r}; write true or false")
        if isinstance(value, str):
            value = number_of(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
            raise UserError(f"{where} is {value!r}; write a number")
        if self.kind is int and value != int(value):
            raise UserError(f"{where} is {value!r}; write a whole number")
        if not self.low <= value <= self.high:
            raise UserError(f"{where} is {value!r}; it must be {self._bounds()}")
        return self.kind(value)

    def _word(self, value: Any, where: str) -> str:
        for written, meaning in self.words:
            if type(value) is type(written) and value == written:
                return meaning
        choices = ", ".join(str(written).lower() for written, _ in self.words)
        raise UserError(f"{where} is {value!r}; write one of {choices}")

    def _bounds(self) -> str:
        if self.high == LARGEST and self.low > -LARGEST:
            return f"at least {self.low:g}, and at most {LARGEST:g}"
        return f"between {self.low:g} and {self.high:g}"


_SHARE = Parameter(low=0, high=1)
_SWITCH = Parameter(bool)
PARAMETERS: dict[str, Parameter] = {
    "weight": Parameter(),
    "density": _SHARE,
    "gamma": _SHARE,
    "epsilon": Parameter(low=0),
    "lambda": Parameter(),
    "t": Parameter(low=0),
    "scale": Parameter(),
    "select_topk": _SHARE,
    "eps": Parameter(low=0),
    "tol": Parameter(low=0),
    "max_iter": Parameter(int, low=1),
    "r": Parameter(low=0),
    "alpha": Parameter(low=0),
    "normalize": _SWITCH,
    "normalize_weights": _SWITCH,
    "nuslerp_flatten": _SWITCH,
    "nuslerp_row_wise": _SWITCH,
    "filter_wise": _SWITCH,
    "int8_mask": _SWITCH,
    "rescale": Parameter(words=((True, "l1"), (False, "none"), ("l1", "l1"), ("density", "density"))),
}
"""Every parameter of every method. `int8_mask` is accepted because recipes for mergekit have it; masks here take a byte
anyway."""


def check_scope(scope: Any, known: Iterable[str], where: str) -> Scope:
    """The parameters of one scope, with their names and values checked.

    Args:
        scope: as read from YAML; None for none.
        known: names that the recipe's methods have.
        where: the scope, for messages.
    Raises:
        UserError: no mapping, an unknown name, or a value of the wrong type.
    """
    if scope is None:
        return {}
    if not isinstance(scope, dict):
        raise UserError(f"{where} is {scope!r}; write a mapping of parameters, such as weight: 0.5")
    known = list(known)
    for name, value in scope.items():
        if name not in known:
            raise UserError(f"{where}.{name} is no parameter of this recipe's methods; {nearest(name, known)}")
        _check_value(value, PARAMETERS[name], f"{where}.{name}")
    return dict(scope)


def value_at(scopes: list[Scope], name: str, tensor: str, t: float, default: Any) -> Any:
    """The value of a parameter for one tensor, from the narrowest scope that has one for it.

    Args:
        scopes: narrow to wide.
        tensor: the tensor's name.
        t: position of its layer in the slice, 0 to 1.
        default: where no scope has a value.
    """
    for scope in scopes:
        if name in scope:
            found, value = _evaluate(scope[name], tensor, t)
            if found:
                return PARAMETERS[name].read(value, f"parameters.{name}")
    return default


def gradient(points: list[float], t: float) -> float:
    """Linear interpolation between equally spaced points, at t in 0 … 1."""
    at = t * (len(points) - 1)
    low = min(int(at), len(points) - 1)
    high = min(low + 1, len(points) - 1)
    return points[low] + (points[high] - points[low]) * (at - low)


def nearest(word: Any, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known one, or all."""
    known = sorted(known)
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known) or 'none'}"


def _check_value(value: Any, parameter: Parameter, where: str) -> None:
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        parameter.read(value, where)
        return
    if not value:
        raise UserError(f"{where} is an empty list; write a value, a gradient or filters")
    filters = [entry for entry in value if isinstance(entry, dict)]
    if not filters:
        if parameter.kind is bool or parameter.words:
            raise UserError(f"{where} is a list; only numbers have a gradient, so write one value")
        for number, entry in enumerate(value):
            parameter.read(entry, f"{where}[{number}]")
        return
    for number, entry in enumerate(value):
        if not isinstance(entry, dict) or "value" not in entry or set(entry) - {"filter", "value"}:
            raise UserError(
                f"{where}[{number}] is {entry!r}; write every entry as {{filter: PART_OF_A_NAME, value: …}}"
            )
        if not isinstance(entry.get("filter", "*"), str):
            raise UserError(f"{where}[{number}].filter is {entry['filter']!r}; write a part of tensor names as a text")
        if isinstance(entry["value"], dict) or (isinstance(entry["value"], list) and _has_filters(entry["value"])):
            raise UserError(f"{where}[{number}].value holds filters again; write a number or a gradient")
        _check_value(entry["value"], parameter, f"{where}[{number}].value")
    for first, second in pairwise(entry.get("filter", "*") for entry in value):
        if first == "*":
            raise UserError(f"{where}: filter {second!r} comes after '*', which matches all names; write it before")


def _has_filters(value: list[Any]) -> bool:
    return any(isinstance(entry, dict) for entry in value)


def _evaluate(value: Any, tensor: str, t: float) -> tuple[bool, Any]:
    """(whether the value is for this tensor, the value)."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return True, value
    if not _has_filters(value):
        return True, gradient([float(point) for point in value], t)
    for entry in value:
        part = entry.get("filter", "*")
        if part == "*" or part in tensor:
            return _evaluate(entry["value"], tensor, t)
    return False, None


def number_of(text: str) -> Any:
    """The number in a text, else the text: YAML 1.1 reads 1e-5 as a text."""
    try:
        return float(text)
    except ValueError:
        return text
