"""Turn omegaconf's errors into one sentence that names the key, its source, and what to write instead."""

import re
from functools import reduce
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigKeyError,
    GrammarParseError,
    InterpolationKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from trinity.config.key_suggestions import all_keys, nearest_keys, unknown_key_hint
from trinity.config.yaml_scalars import fields_of, is_section

NAMED_MAPS = ("data.train", "data.validation", "data.mixture", "health.forgetting")
"""Keys whose value maps names that the user chooses."""

_PLAINER = (
    (r"Key '.*?' not in '\w+'", "not a known key"),
    (r".*: (\w+) is not a subclass of \w+\. value: .*", r"needs settings, not a single \1; write {KEY: VALUE}"),
    (r"Incompatible value 'None' for field of type .*", "must not be null; write a value, or leave the key out"),
    (r"Value '(.*)' of type '\w+' could not be converted to Integer", r"'\1' is not a whole number; write one"),
    (r"Value '(.*)' of type '\w+' could not be converted to Float", r"'\1' is not a number; write one"),
    (r"field '\w+' is not Optional", "must not be null; write a value, or leave the key out"),
    (r"TupleConfig length (\d+) does not match type hint length (\d+)", r"needs \2 values, not \1"),
    (r"Structured config of type `\w+` has missing mandatory value: \w+", "must be given; write a value"),
    (r".* is not a ListConfig, TupleConfig, list, or tuple\.?", "must be a list; write [VALUE, VALUE]"),
    (r"Cannot convert 'DictConfig' to string: (.*)", r"must be a text, not the map \1"),
)
"""Pattern of an omegaconf message → a plainer message, without names of classes."""


def plain_message(error: Exception) -> str:
    """The first line of omegaconf's message, in plain words where it names classes."""
    message = str(error).splitlines()[0]
    for pattern, plainer in _PLAINER:
        message = re.sub(f"^{pattern}", plainer, message)
    return message


def one_line(error: Exception) -> str:
    """The whole message on one line, for a source that is not valid YAML."""
    return " ".join(str(error).split()) + reference_hint(error)


def reference_hint(error: Exception) -> str:
    """What to write if the error is a ${…} that refers to no setting."""
    reference = isinstance(error, InterpolationKeyError | InterpolationResolutionError | GrammarParseError)
    return r"; write \${ for the characters themselves" if reference else ""


def merge_message(error: OmegaConfBaseException, merged: DictConfig, raw: Any, section: str, where: str) -> str:
    """The sentence for a section of a source that cannot be merged.

    Args:
        error: raised by merging the section.
        merged: the config that the section was merged into.
        raw: all settings of the source, as dicts and lists.
        section: first part of the keys.
        where: name of the source.
    """
    error_key = str(getattr(error, "full_key", None) or section)
    if isinstance(error, ConfigKeyError) and error_key.startswith(section):
        return _unknown_key(error_key, reduce(_child, error_key.split("."), raw), where)
    deepest = _deepest_failing_key(merged, section, raw[section])
    # for an entry of a list, omegaconf names only the last part of the key
    inside = "" if deepest.startswith(error_key) or error_key.startswith(deepest) else f"{error_key} of "
    key = error_key if error_key.startswith(deepest) else f"{inside}{deepest}"
    return f"{key} in {where}: {plain_message(error)}{_entry_hint(error) or _map_hint(key)}"


def _map_hint(key: str) -> str:
    """How to write the map that `key` names or belongs to; empty for other keys."""
    map_key = next((name for name in NAMED_MAPS if key == name or key.startswith(f"{name}.")), "")
    value = {"data.mixture": "WEIGHT", "health.forgetting": "NATS"}.get(map_key, "PATH")
    return f"; write '{map_key}={{NAME: {value}}}', in quotes and with a space after the colon" if map_key else ""


def _entry_hint(error: OmegaConfBaseException) -> str:
    """The keys of a list's entry, if an unknown key in it resembles none; otherwise omegaconf names the nearest."""
    entry: Any = error.object_type
    unknown = isinstance(error, ConfigKeyError) and is_section(entry) and "Did you mean" not in str(error)
    return f"; an entry has {', '.join(fields_of(entry))}" if unknown else ""


def _deepest_failing_key(merged: DictConfig, key: str, value: Any) -> str:
    """The longest key at or below `key` that cannot be merged. omegaconf's errors do not always name it."""
    for name in value if isinstance(value, dict) else ():
        below = f"{key}.{name}"
        nested = reduce(lambda inner, part: {part: inner}, reversed(below.split(".")), value[name])
        try:
            merged.merge_with(nested)
        except OmegaConfBaseException:
            return _deepest_failing_key(merged, below, value[name])
    return key


def _child(node: Any, name: str) -> Any:
    return node.get(name) if isinstance(node, dict) else None


def _unknown_key(full_key: str, value: Any, where: str) -> str:
    """The message for an unknown key, whose value in the source is `value`."""
    if full_key in set(all_keys()):  # in a file, dots do not nest
        nested = ": {".join(full_key.split(".")) + ": …" + "}" * full_key.count(".")
        return f"{full_key} in {where} is written with dots; in a file write {nested}"
    deeper = full_key
    while isinstance(value, dict) and value and not nearest_keys(deeper, list(all_keys())):
        name, value = next(iter(value.items()))
        deeper = f"{deeper}.{name}"
    key = deeper if nearest_keys(deeper, list(all_keys())) else full_key
    return f"{key} in {where} is not a known key; {unknown_key_hint(key)}"
