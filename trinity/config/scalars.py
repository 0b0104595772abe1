"""YAML whose plain scalars keep their source text, so that the type of the field decides what they are.

YAML alone makes 8 of 0010, true of yes, 3.1 of 3.10 and infinity of 12e4567. Here a text field gets the characters as
they were typed, a field of fixed words gets its word (on, off), and a number is read as a decimal one: 0010 is 10.
"""

import re
import types
import typing
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import Any, Literal

import yaml

from trinity.errors import UserError

_TAG = "tag:yaml.org,2002:"
_NULL = ("", "~", "null", "Null", "NULL")
"""What YAML 1.1 takes for no value."""
_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9]+(?:_[0-9]+)*[eE][-+]?[0-9]+
        |[-+]?\.[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
"""YAML 1.1's floats, and 17e12 and 1e-4, which it takes for texts. Not 1:30.5, which is 90.5 to it."""


@dataclass(frozen=True)
class Scalar:
    """A plain YAML scalar that is a number or a boolean where no text is wanted."""

    text: str
    value: Any


class ScalarLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """YAML's safe loader with a Scalar for every plain number and boolean, and texts for all keys of mappings."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A mapping; the key 2020 is the text."""
        if isinstance(node, yaml.MappingNode):
            self.flatten_mapping(node)
            for key, _ in node.value:
                if key.tag in (f"{_TAG}int", f"{_TAG}float", f"{_TAG}bool"):
                    key.tag = f"{_TAG}str"
        return super().construct_mapping(node, deep=deep)


def _int(loader: ScalarLoader, node: yaml.ScalarNode) -> Scalar | str:
    if ":" in node.value:  # 1:30 is 90 to YAML 1.1; no field counts in sixties
        return node.value
    decimal = re.fullmatch("[-+]?[0-9][0-9_]*", node.value)
    return Scalar(node.value, int(node.value.replace("_", "")) if decimal else loader.construct_yaml_int(node))


def _float(loader: ScalarLoader, node: yaml.ScalarNode) -> Scalar:
    return Scalar(node.value, loader.construct_yaml_float(node))


def _bool(loader: ScalarLoader, node: yaml.ScalarNode) -> Scalar:
    return Scalar(node.value, loader.construct_yaml_bool(node))


ScalarLoader.add_constructor(f"{_TAG}int", _int)
ScalarLoader.add_constructor(f"{_TAG}float", _float)
ScalarLoader.add_constructor(f"{_TAG}bool", _bool)
for _sign in ("merge", "value"):  # << and =, which mean something as keys alone; elsewhere they are texts
    ScalarLoader.add_constructor(f"{_TAG}{_sign}", ScalarLoader.construct_yaml_str)
ScalarLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (f"{_TAG}timestamp", f"{_TAG}float")]
    for first, resolvers in ScalarLoader.yaml_implicit_resolvers.items()
}
ScalarLoader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))


def read_yaml(text: str) -> Any:
    """The value of a YAML text, with a Scalar for each plain number and boolean.

    Raises:
        yaml.YAMLError, ValueError: it is none.
    """
    return yaml.load(text, Loader=ScalarLoader)


def read_word(word: str, key: str, section: type, where: str) -> Any:
    """The value of `key=word` on the command line, by the type of the field.

    Raises:
        UserError: a text field gets no text, or characters that no file could hold.
        yaml.YAMLError, ValueError: a field of another type gets what is no YAML.
    """
    kind = kind_of(key, section)
    if not _is_text(kind) or word in _NULL or word[0] in "'\"":
        return typed(read_yaml(word), kind, key, where)
    strange = yaml.reader.Reader.NON_PRINTABLE.search(word)
    if strange:
        raise UserError(f"{key} in {where} holds the character U+{ord(strange[0]):04X}; write plain text in UTF-8")
    return word


def typed(value: Any, kind: Any, key: str, where: str) -> Any:
    """A value of read_yaml with each Scalar as the type of its field wants it.

    Args:
        value: scalars, lists and dicts.
        kind: type of the field, or a section's dataclass; what does not fit it is left for the schema to refuse.
        key, where: what the value is called, for messages.
    Raises:
        UserError: nothing, where a text is wanted.
    """
    kind, optional = _optional(kind)
    if isinstance(value, Scalar):
        wanted = kind is str or (typing.get_origin(kind) is Literal and value.text in typing.get_args(kind))
        return value.text if wanted else value.value
    if isinstance(value, dict):
        return {name: typed(inner, _below(kind, name), _joined(key, name), where) for name, inner in value.items()}
    if isinstance(value, list):
        return [typed(inner, _entry(kind, index), f"{key}[{index}]", where) for index, inner in enumerate(value)]
    if value is None and kind is str and not optional:
        raise UserError(f"{key} in {where} is empty; write a text, in quotes where it is null or ~")
    return value


def kind_of(key: str, section: type) -> Any:
    """The type of a dotted key below a section's dataclass; Any where there is none."""
    kind: Any = section
    for name in key.split("."):
        kind = _below(_optional(kind)[0], name)
    return kind


@cache
def fields_of(section: type) -> dict[str, Any]:
    """Field → type of a section's dataclass."""
    return typing.get_type_hints(section)


def _is_text(kind: Any) -> bool:
    return _optional(kind)[0] is str


def _optional(kind: Any) -> tuple[Any, bool]:
    """The type without None, and whether None is one of its values."""
    if typing.get_origin(kind) not in (types.UnionType, typing.Union):
        return kind, kind is Any
    rest = [part for part in typing.get_args(kind) if part is not types.NoneType]
    return rest[0], len(rest) < len(typing.get_args(kind))


def _below(kind: Any, name: str) -> Any:
    if is_dataclass(kind):
        return fields_of(kind).get(name, Any)
    return typing.get_args(kind)[1] if typing.get_origin(kind) is dict else Any


def _entry(kind: Any, index: int) -> Any:
    entries = typing.get_args(kind) if typing.get_origin(kind) in (list, tuple) else ()
    if typing.get_origin(kind) is list:
        return entries[0]
    return entries[index] if index < len(entries) else Any


def _joined(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)
