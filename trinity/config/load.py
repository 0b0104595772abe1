"""Load a RunConfig from a YAML file and command-line overrides (`a.b=value`), and check it.

Later sources win: the sizes of the model that init or model.name names (trinity.config.model_sizes), then the file,
then the overrides. Every mistake becomes a UserError of one sentence.
"""

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.omegaconf import get_yaml_loader

from trinity.config.check import check_run
from trinity.config.model import ModelConfig
from trinity.config.model_sizes import initial_model
from trinity.config.omegaconf_errors import NAMED_MAPS, merge_message, one_line, plain_message, reference_hint
from trinity.config.paths import expand_home, expand_user, nearest_path
from trinity.config.run import RunConfig
from trinity.config.yaml_scalars import read_override, read_yaml, resolve_scalars
from trinity.errors import UserError
from trinity.io.local import write_atomically

COMMAND_LINE = "the command line"
SWITCHES = ("parallel.defer_reduce", "optim.muon.share")
"""Keys with the values auto, on and off. YAML reads the last two as booleans."""
INTEGER_LIMIT = 1 << 63
"""Integers must be smaller, so that counts of tokens and steps fit into 64 bits."""


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Load and check a config.

    Args:
        path: YAML file.
        overrides: words of the command line, each `a.b=value`; they win over the file.
    Raises:
        UserError: a missing or broken file, an unknown key (naming the nearest known one), a wrong type, or values
            that do not fit together.
    """
    path = expand_user(str(path), "the config")
    from_file, from_command_line = _read_file(Path(path)), _read_overrides(overrides or [])
    for key in NAMED_MAPS:
        # data.train={mine: FOLDER} replaces the file's map; data.train.mine=FOLDER adds an entry to it
        if any(word.replace(" ", "").startswith(f"{key}={{") for word in overrides or []):
            OmegaConf.update(from_file, key, {}, merge=False)
    return build_config([(path, from_file), (COMMAND_LINE, from_command_line)])


def build_config(sources: list[tuple[str, DictConfig]]) -> RunConfig:
    """Merge (name, settings) sources, later ones winning, over the sizes of the model that they start from."""
    model = initial_model(sources)
    merged = deepcopy(_defaults(model))
    for where, raw in sources:
        for key in SWITCHES:
            if isinstance(value := OmegaConf.select(raw, key), bool):
                OmegaConf.update(raw, key, "on" if value else "off")
        _merge(merged, raw, where)
    merged.model.name = model.name  # init may give another model than model.name does
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # a list's entry without a required value, or a wrong ${reference}
        where = " or ".join(name for name, _ in sources)
        raise UserError(f"{error.full_key} in {where}: {plain_message(error)}{reference_hint(error)}") from None
    assert isinstance(config, RunConfig)  # the schema of _defaults
    check_run(config)
    expand_home(config)
    return config


@cache
def _defaults(model: ModelConfig) -> DictConfig:
    """The default run of a model. Cached: building it takes omegaconf five times as long as copying it."""
    defaults = OmegaConf.structured(RunConfig(model=model))
    OmegaConf.set_readonly(defaults.model, False)  # omegaconf makes frozen dataclasses read-only
    return defaults


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config as YAML, atomically."""
    write_atomically(path, to_yaml(config))


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML, keys in the order of the dataclasses."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(asdict(config))))


def _escaped(node: Any) -> Any:
    """Escape ${ in texts, so that loading does not take it for a reference to another setting."""
    if isinstance(node, dict):
        return {name: _escaped(value) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [_escaped(value) for value in node]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", node) if isinstance(node, str) else node


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted key → value of every setting; a map such as data.train is one value."""

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
        checked = _load_with_omegaconf(path)
        raw = read_yaml(path.read_text(encoding="utf-8")) if OmegaConf.is_dict(checked) else None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; give a YAML file") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:  # ValueError: !!int abc, 5000 digits
        raise UserError(f"{path} is not valid YAML: {one_line(error)}") from None
    if not OmegaConf.is_dict(checked):
        raise UserError(f"{path} holds no settings; it must be a YAML mapping such as `run: {{name: mine}}`")
    content = raw if isinstance(raw, dict) else OmegaConf.to_container(checked)  # an empty file, or a single word
    return _plain(resolve_scalars(content, RunConfig, "", str(path)), str(path))


def _load_with_omegaconf(path: Path) -> Any:
    """The file as OmegaConf.load reads it; None if it holds a single number.

    omegaconf's loader refuses unsafe YAML: recursion, exploding aliases, duplicate keys. It would also refuse the
    values << and =, which are read as texts here.
    """
    loader = get_yaml_loader()
    for sign in ("merge", "value"):
        loader.add_constructor(f"tag:yaml.org,2002:{sign}", loader.construct_yaml_str)
    with path.absolute().open(encoding="utf-8") as file:
        content = yaml.load(file, Loader=loader)
    if content is None:
        return OmegaConf.create()
    return OmegaConf.create(content) if isinstance(content, list | dict | str) else None


def _read_overrides(overrides: list[str]) -> DictConfig:
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals or not all(key.split(".")) or "[" in key:
            hint = ", and a whole list as a.b=[…]" if "[" in key else ""
            if word.endswith(("}", "]")):  # the end of a value that the shell split at its spaces
                hint += "; a value with spaces needs quotes, as in 'data.train={mine: data/mine/train}'"
            raise UserError(f"{word} is not a setting; write a.b=value{hint}")
    raw = OmegaConf.create()
    for word in overrides:
        key, _, text = word.partition("=")
        try:
            OmegaConf.update(raw, key, read_override(text, key, RunConfig, COMMAND_LINE))
        except UserError:
            raise
        except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
            raise UserError(f"{COMMAND_LINE} is not valid: {one_line(error)}") from None
    return _plain(OmegaConf.to_container(raw), COMMAND_LINE)


def _plain(raw: Any, where: str) -> DictConfig:
    """Convert whole floats such as 17e12 to integers; the schema converts them back where it has a float.

    Raises:
        UserError: an integer of more than 64 bits, or a text with a zero byte, which no path may hold.
    """

    def walk(key: str, node: Any) -> Any:
        if isinstance(node, dict):
            return {name: walk(f"{key}.{name}" if key else str(name), value) for name, value in node.items()}
        if isinstance(node, list):
            return [walk(f"{key}[{index}]", value) for index, value in enumerate(node)]
        if isinstance(node, int) and abs(node) >= INTEGER_LIMIT:
            raise UserError(f"{key} in {where} is a number of {len(str(node))} digits; write one below 2^63")
        if isinstance(node, str) and "\0" in node:
            raise UserError(f"{key} in {where} holds a zero byte; write plain text")
        return int(node) if isinstance(node, float) and node.is_integer() and abs(node) < INTEGER_LIMIT else node

    try:
        return OmegaConf.create(walk("", raw))
    except OmegaConfBaseException as error:  # an unclosed ${
        raise UserError(f"{where} is not valid YAML: {one_line(error)}") from None


def _merge(merged: DictConfig, raw: DictConfig, where: str) -> None:
    """Merge in place: OmegaConf.merge would copy everything for each section, a tenth of a second per config."""
    for section in raw:
        try:
            merged.merge_with({section: raw[section]})
        except OmegaConfBaseException as error:
            raise UserError(merge_message(error, merged, OmegaConf.to_container(raw), str(section), where)) from None
