"""From a YAML file and dotted words to a checked RunConfig; every mistake becomes one sentence.

The order: the model that init or model.name names (trinity.config.start), then the file, then the command line's words.
"""

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, is_dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    GrammarParseError,
    InterpolationKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)
from omegaconf.omegaconf import get_yaml_loader

from trinity.config.check import check_run
from trinity.config.model import ModelConfig
from trinity.config.paths import expand_home, expand_user, nearest_path
from trinity.config.run import RunConfig
from trinity.config.scalars import fields_of, read_word, read_yaml, typed
from trinity.config.start import starting_model
from trinity.config.suggest import about_key, all_keys, nearest_keys
from trinity.errors import UserError
from trinity.io.local import write_atomically

COMMAND_LINE = "the command line"
SWITCHES = ("parallel.defer_reduce", "optim.muon.share")
"""auto, on or off: the last two are booleans to YAML."""
LIMIT = 1 << 63
"""Integers are smaller, so that they fit into what counts tokens and steps."""
NAMED_MAPS = ("data.train", "data.validation", "data.mixture")


def load_config(path: str | Path, words: list[str] | None = None) -> RunConfig:
    """Read a config file and the command line's `a.b=value` words.

    Raises:
        UserError: a missing or broken file, an unknown key (naming the nearest known one), a wrong type, or values
            that do not fit together.
    """
    path = expand_user(str(path), "the config")
    from_file, from_words = _read_file(Path(path)), _read_words(words or [])
    for key in NAMED_MAPS:
        # data.train={mine: FOLDER} says what there is; data.train.mine=FOLDER adds to what the file says
        if any(word.replace(" ", "").startswith(f"{key}={{") for word in words or []):
            OmegaConf.update(from_file, key, {}, merge=False)
    return build_config([(path, from_file), (COMMAND_LINE, from_words)])


def build_config(sources: list[tuple[str, DictConfig]]) -> RunConfig:
    """Merge named sources, later ones winning, over the model that they name or start from."""
    model = starting_model(sources)
    merged = deepcopy(_defaults(model))
    for where, raw in sources:
        for key in SWITCHES:
            if isinstance(value := OmegaConf.select(raw, key), bool):
                OmegaConf.update(raw, key, "on" if value else "off")
        _merge(merged, raw, where)
    merged.model.name = model.name  # init may have brought another model than the one that was named
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # an entry of a list that lacks a value, an interpolation
        where = " or ".join(name for name, _ in sources)
        raise UserError(
            f"{error.full_key} in {where}: {str(error).splitlines()[0]}{_about_references(error)}"
        ) from None
    check_run(config)
    expand_home(config)
    return config


@cache
def _defaults(model: ModelConfig) -> DictConfig:
    """A run of a model; made once, because omegaconf takes five times as long for it as for a copy."""
    made = OmegaConf.structured(RunConfig(model=model))
    OmegaConf.set_readonly(made.model, False)  # frozen dataclasses arrive read-only
    return made


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config as YAML, whole or not at all."""
    write_atomically(path, to_yaml(config))


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML, keys in the order of the dataclasses."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(asdict(config))))


def _escaped(node: Any) -> Any:
    """Texts with ${ in them, written so that loading takes it for characters and not for a reference."""
    if isinstance(node, dict):
        return {name: _escaped(value) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [_escaped(value) for value in node]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", node) if isinstance(node, str) else node


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted key → value for every setting; named maps such as data.train count as one value."""

    def walk(prefix: str, node: Any) -> Iterator[tuple[str, Any]]:
        plain = asdict(node)
        for name in plain:
            value, key = getattr(node, name), f"{prefix}{name}"
            if is_dataclass(value):
                yield from walk(f"{key}.", value)
            else:
                yield key, plain[name]

    return dict(walk("", config))


def _read_file(path: Path) -> DictConfig:
    if path.is_dir():
        raise UserError(f"the config {path} is a folder; give a YAML file such as configs/smoke.yaml")
    if not path.is_file():
        near = nearest_path(path)
        hint = f"did you mean {near}?" if near else "give a YAML file such as configs/smoke.yaml"
        raise UserError(f"the config {path} does not exist; {hint}")
    try:
        checked = _checked(path)
        raw = read_yaml(path.read_text(encoding="utf-8")) if OmegaConf.is_dict(checked) else None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; give a YAML file") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:  # ValueError: !!int abc, 5000 digits
        raise UserError(f"{path} is not valid YAML: {_one_line(error)}") from None
    if not OmegaConf.is_dict(checked):
        raise UserError(f"{path} holds no settings; it must be a YAML mapping such as `run: {{name: mine}}`")
    content = raw if isinstance(raw, dict) else OmegaConf.to_container(checked)  # an empty file, or a lone word
    return _plain(typed(content, RunConfig, "", str(path)), str(path))


def _checked(path: Path) -> Any:
    """The file as OmegaConf.load reads it; None where it holds a lone number.

    Its loader refuses what is unsafe: recursion, aliases that explode, a key named twice. It would refuse << and = as
    values too, which are texts.
    """
    loader = get_yaml_loader()
    for sign in ("merge", "value"):
        loader.add_constructor(f"tag:yaml.org,2002:{sign}", loader.construct_yaml_str)
    with path.absolute().open(encoding="utf-8") as file:
        content = yaml.load(file, Loader=loader)
    if content is None:
        return OmegaConf.create()
    return OmegaConf.create(content) if isinstance(content, list | dict | str) else None


def _read_words(words: list[str]) -> DictConfig:
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals or not all(key.split(".")) or "[" in key:
            hint = ", and a whole list as a.b=[…]" if "[" in key else ""
            if word.endswith(("}", "]")):  # the end of a value that a shell has cut at its spaces
                hint += "; a value with spaces needs quotes, as in 'data.train={mine: data/mine/train}'"
            raise UserError(f"{word} is not a setting; write a.b=value{hint}")
    raw = OmegaConf.create()
    for word in words:
        key, _, text = word.partition("=")
        try:
            OmegaConf.update(raw, key, read_word(text, key, RunConfig, COMMAND_LINE))
        except UserError:
            raise
        except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
            raise UserError(f"{COMMAND_LINE} is not valid: {_one_line(error)}") from None
    return _plain(OmegaConf.to_container(raw), COMMAND_LINE)


def _plain(raw: dict, where: str) -> DictConfig:
    """Turn 17e12, a float to YAML, into the integer it is; where a float is wanted the integer turns back.

    Raises:
        UserError: an integer of more than 64 bits, or a text that the system would refuse as a path.
    """

    def walk(key: str, node: Any) -> Any:
        if isinstance(node, dict):
            return {name: walk(f"{key}.{name}" if key else str(name), value) for name, value in node.items()}
        if isinstance(node, list):
            return [walk(f"{key}[{index}]", value) for index, value in enumerate(node)]
        if isinstance(node, int) and abs(node) >= LIMIT:
            raise UserError(f"{key} in {where} is a number of {len(str(node))} digits; write one below 2^63")
        if isinstance(node, str) and "\0" in node:
            raise UserError(f"{key} in {where} holds a zero byte; write plain text")
        return int(node) if isinstance(node, float) and node.is_integer() and abs(node) < LIMIT else node

    try:
        return OmegaConf.create(walk("", raw))
    except OmegaConfBaseException as error:  # ${ that is never closed
        raise UserError(f"{where} is not valid YAML: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) + _about_references(error)


def _about_references(error: Exception) -> str:
    """What to write where a ${…} that is no reference made an error."""
    known = isinstance(error, InterpolationKeyError | InterpolationResolutionError | GrammarParseError)
    return r"; write \${ for the characters themselves" if known else ""


def _merge(merged: DictConfig, raw: DictConfig, where: str) -> None:
    """Merge in place: OmegaConf.merge would copy the whole for each section, a tenth of a second a config."""
    for section in raw:
        try:
            merged.merge_with({section: raw[section]})
        except OmegaConfBaseException as error:
            named = str(getattr(error, "full_key", None) or section)
            if isinstance(error, ConfigKeyError) and named.startswith(str(section)):
                given = reduce(_inside, named.split("."), OmegaConf.to_container(raw))
                raise UserError(_unknown_key(named, given, where)) from None
            narrow = _narrowed(merged, str(section), OmegaConf.to_container(raw)[section])
            # of a list's entry omegaconf names the last word alone
            inside = "" if narrow.startswith(named) or named.startswith(narrow) else f"{named} of "
            key = named if named.startswith(narrow) else f"{inside}{narrow}"
            about = _about_entry(error) or _about_map(key)
            raise UserError(f"{key} in {where}: {str(error).splitlines()[0]}{about}") from None


def _about_map(key: str) -> str:
    """How a map of names is written."""
    of = next((known for known in NAMED_MAPS if key == known or key.startswith(f"{known}.")), "")
    value = "WEIGHT" if of == "data.mixture" else "PATH"
    return f"; write '{of}={{NAME: {value}}}', in quotes and with a space after the colon" if of else ""


def _about_entry(error: OmegaConfBaseException) -> str:
    """What a list's entry has, where a key in it is like none of it; else omegaconf names the nearest."""
    unknown = isinstance(error, ConfigKeyError) and is_dataclass(error.object_type) and "Did you mean" not in str(error)
    return f", which has {', '.join(fields_of(error.object_type))}" if unknown else ""


def _narrowed(merged: DictConfig, key: str, value: Any) -> str:
    """The longest key below `key` that cannot be merged, which omegaconf's errors do not always name."""
    for name in value if isinstance(value, dict) else ():
        below = f"{key}.{name}"
        nested = reduce(lambda inner, part: {part: inner}, reversed(below.split(".")), value[name])
        try:
            merged.merge_with(nested)
        except OmegaConfBaseException:
            return _narrowed(merged, below, value[name])
    return key


def _inside(node: Any, name: str) -> Any:
    return node.get(name) if isinstance(node, dict) else None


def _unknown_key(full_key: str, given: Any, where: str) -> str:
    """The sentence about a key that does not exist; `given`: what was to be set there."""
    if full_key in set(all_keys()):  # in a file, dots do not nest
        nested = ": {".join(full_key.split(".")) + ": …" + "}" * full_key.count(".")
        return f"{full_key} in {where} is written with dots; in a file write {nested}"
    deeper = full_key
    while isinstance(given, dict) and given and not nearest_keys(deeper, list(all_keys())):
        name, given = next(iter(given.items()))
        deeper = f"{deeper}.{name}"
    named = deeper if nearest_keys(deeper, list(all_keys())) else full_key
    return f"{named} in {where} is not a known key; {about_key(named)}"
