"""Read YAML scalars by the type of their config field: a text field gets the characters as they were typed.

Plain YAML reads 0010 as 8, yes as true, 3.10 as 3.1 and 12e4567 as infinity. Here plain scalars keep their source text
until the type of the field is known: a text field gets that text, a field of fixed words gets its word (on, off), and a
number is decimal: 0010 is 10.
"""

import re
import types
import typing
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import Any, Literal, TypeGuard

import yaml

from trinity.errors import UserError

_TAG = "tag:yaml.org,2002:"
_NULL = ("", "~", "null", "Null", "NULL")
"""Scalars that YAML 1.1 reads as null."""
_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9]+(?:_[0-9]+)*[eE][-+]?[0-9]+
        |[-+]?\.[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
"""YAML 1.1's floats, without 1:30.5 (90.5 in YAML 1.1), and with 17e12 and 1e-4 (texts in YAML 1.1)."""


@dataclass(frozen=True)
class Scalar:
    """A plain YAML scalar that is a number or a boolean unless its field is a text."""

    text: str
    value: Any


class ScalarLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # the C loader is optional
    """YAML's safe loader that makes a Scalar of every plain number and boolean, and a text of every mapping key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A mapping whose keys are texts, such as the key 2020."""
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
for _sign in ("merge", "value"):  # << and = are special as keys only; as values they are texts
    ScalarLoader.add_constructor(f"{_TAG}{_sign}", ScalarLoader.construct_yaml_str)
ScalarLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (f"{_TAG}timestamp", f"{_TAG}float")]
    for first, resolvers in ScalarLoader.yaml_implicit_resolvers.items()
}
ScalarLoader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))


def read_yaml(text: str) -> Any:
    """Parse YAML, with a Scalar for each plain number and boolean.

    Raises:
        yaml.YAMLError, ValueError: the text is not valid YAML.
    """
    return yaml.load(text, Loader=ScalarLoader)


def read_override(text: str, key: str, section: type, where: str) -> Any:
    """The value of `key=text` on the command line, read by the type of the field.

    Raises:
        UserError: a text field gets no text, or a character that YAML files cannot hold.
        yaml.YAMLError, ValueError: the value of another field is not valid YAML.
    """
    kind = type_of(key, section)
    if not _is_text(kind) or text in _NULL or text[0] in "'\"":
        return resolve_scalars(read_yaml(text), kind, key, where)
    invalid = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if invalid:
        raise UserError(f"{key} in {where} holds the character U+{ord(invalid[0]):04X}; write plain text in UTF-8")
    return text


def resolve_scalars(value: Any, kind: Any, key: str, where: str) -> Any:
    """A value of read_yaml with each Scalar converted to the type of its field.

    Args:
        value: scalars, lists and dicts.
        kind: type of the field, or a section's dataclass. A value that does not fit it is left to the schema.
        key, where: key and source of the value, for messages.
    Raises:
        UserError: a text field has no value.
    """
    kind, optional = _optional(kind)
    if isinstance(value, Scalar):
        is_text = kind is str or (typing.get_origin(kind) is Literal and value.text in typing.get_args(kind))
        return value.text if is_text else value.value
    if isinstance(value, dict):
        return {
            name: resolve_scalars(inner, _field_type(kind, name), _joined(key, name), where)
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return [
            resolve_scalars(inner, _entry_type(kind, index), f"{key}[{index}]", where)
            for index, inner in enumerate(value)
        ]
    if value is None and kind is str and not optional:
        raise UserError(f"{key} in {where} is empty; write a text, in quotes where it is null or ~")
    return value


def type_of(key: str, section: type) -> Any:
    """The type of a dotted key below a section's dataclass; Any for an unknown key."""
    kind: Any = section
    for name in key.split("."):
        kind = _field_type(_optional(kind)[0], name)
    return kind


@cache
def fields_of(section: type) -> dict[str, Any]:
    """Field → type of a section's dataclass."""
    return typing.get_type_hints(section)


def is_section(kind: Any) -> TypeGuard[type]:
    """Whether a field's type is a section: a dataclass."""
    return is_dataclass(kind)


def _is_text(kind: Any) -> bool:
    return _optional(kind)[0] is str


def _optional(kind: Any) -> tuple[Any, bool]:
    """(the type without None, whether None is allowed)."""
    if typing.get_origin(kind) not in (types.UnionType, typing.Union):
        return kind, kind is Any
    rest = [part for part in typing.get_args(kind) if part is not types.NoneType]
    return rest[0], len(rest) < len(typing.get_args(kind))


def _field_type(kind: Any, name: str) -> Any:
    if is_section(kind):
        return fields_of(kind).get(name, Any)
    return typing.get_args(kind)[1] if typing.get_origin(kind) is dict else Any


def _entry_type(kind: Any, index: int) -> Any:
    entries = typing.get_args(kind) if typing.get_origin(kind) in (list, tuple) else ()
    if typing.get_origin(kind) is list:
        return entries[0]
    return entries[index] if index < len(entries) else Any


def _joined(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)
