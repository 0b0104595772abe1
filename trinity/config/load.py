"""From a YAML file and dotted words to a checked RunConfig; every mistake becomes one sentence.

The order: the zoo's model named by model.name, then the file, then the command line's words.
"""

import difflib
from copy import deepcopy
from functools import cache, reduce
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from trinity.config.check import check_run
from trinity.config.model import ZOO
from trinity.config.run import RunConfig
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
    from_file, from_words = _read_file(Path(path)), _read_words(words or [])
    for key in NAMED_MAPS:
        # data.train={mine: FOLDER} says what there is; data.train.mine=FOLDER adds to what the file says
        if any(word.replace(" ", "").startswith(f"{key}={{") for word in words or []):
            OmegaConf.update(from_file, key, {}, merge=False)
    return build_config([(str(path), from_file), (COMMAND_LINE, from_words)])


def build_config(sources: list[tuple[str, DictConfig]]) -> RunConfig:
    """Merge named sources, later ones winning, over the model that they name."""
    name = "smoke"
    for _, raw in sources:
        model = raw.get("model")
        if OmegaConf.is_dict(model) and model.get("name") is not None:
            name = model.name
    if not isinstance(name, str) or name not in ZOO:
        raise UserError(f"model.name={name} is not known; use one of {', '.join(ZOO)}")
    merged = deepcopy(_defaults(name))
    for where, raw in sources:
        for key in SWITCHES:
            if isinstance(value := OmegaConf.select(raw, key), bool):
                OmegaConf.update(raw, key, "on" if value else "off")
        _merge(merged, raw, where)
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # an entry of a list that lacks a value, an interpolation
        where = " or ".join(name for name, _ in sources)
        raise UserError(f"{error.full_key} in {where}: {str(error).splitlines()[0]}") from None
    check_run(config)
    return config


@cache
def _defaults(name: str) -> DictConfig:
    """A run of one of the zoo's models; made once, because omegaconf takes five times as long for it as for a copy."""
    made = OmegaConf.structured(RunConfig(model=ZOO[name]))
    OmegaConf.set_readonly(made.model, False)  # frozen dataclasses arrive read-only
    return made


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config as YAML, whole or not at all."""
    write_atomically(path, to_yaml(config))


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML, keys in the order of the dataclasses."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted key → value for every setting; named maps such as data.train count as one value."""
    found: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        typed = OmegaConf.is_dict(node) and OmegaConf.get_type(node) is not dict
        if not typed:
            found[prefix] = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
            return
        for key in node:
            walk(f"{prefix}.{key}" if prefix else key, node[key])

    walk("", OmegaConf.structured(config))
    return found


def _read_file(path: Path) -> DictConfig:
    if not path.is_file():
        raise UserError(f"the config {path} does not exist; give a YAML file such as configs/smoke.yaml")
    try:
        raw = OmegaConf.load(path)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; give a YAML file") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:  # ValueError: !!int abc, 5000 digits
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raw = None  # omegaconf's way to say that the file holds a lone number
    if not OmegaConf.is_dict(raw):
        raise UserError(f"{path} holds no settings; it must be a YAML mapping such as `run: {{name: mine}}`")
    return _plain(raw, str(path))


def _read_words(words: list[str]) -> DictConfig:
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals or not all(key.split(".")) or "[" in key:
            hint = ", and a whole list as a.b=[…]" if "[" in key else ""
            raise UserError(f"{word} is not a setting; write a.b=value{hint}")
    try:
        raw = OmegaConf.from_dotlist(words)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{COMMAND_LINE} is not valid: {' '.join(str(error).split())}") from None
    return _plain(raw, COMMAND_LINE)


def _plain(raw: DictConfig, where: str) -> DictConfig:
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

    return OmegaConf.create(walk("", OmegaConf.to_container(raw)))


def _merge(merged: DictConfig, raw: DictConfig, where: str) -> None:
    """Merge in place: OmegaConf.merge would copy the whole for each section, a tenth of a second a config."""
    for section in raw:
        try:
            merged.merge_with({section: raw[section]})
        except OmegaConfBaseException as error:
            named = str(getattr(error, "full_key", None) or section)
            if isinstance(error, ConfigKeyError) and named.startswith(str(section)):
                raise UserError(_unknown_key(merged, named, where)) from None
            narrow = _narrowed(merged, str(section), OmegaConf.to_container(raw)[section])
            # of a list's entry omegaconf names the last word alone
            inside = "" if narrow.startswith(named) or named.startswith(narrow) else f"{named} of "
            key = named if named.startswith(narrow) else f"{inside}{narrow}"
            raise UserError(f"{key} in {where}: {str(error).splitlines()[0]}") from None


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


def _unknown_key(merged: DictConfig, full_key: str, where: str) -> str:
    parent, _, key = full_key.rpartition(".")
    section = OmegaConf.select(merged, parent) if parent else merged
    if not OmegaConf.is_dict(section):  # 1.5: a number, or a setting that has nothing below it
        parent, key, section = "", full_key, merged
    nearest = difflib.get_close_matches(key, [str(name) for name in section], n=1, cutoff=0)
    suggestion = ".".join(filter(None, (parent, *nearest)))
    if suggestion == full_key:  # in a file, dots do not nest
        nested = ": {".join(suggestion.split(".")) + ": …" + "}" * suggestion.count(".")
        return f"{suggestion} in {where} is written with dots; in a file write {nested}"
    return f"{full_key} in {where} is not a known key; did you mean {suggestion}?"
