"""The sizes that a run's model starts from: the zoo's, or those of the folder or run that init names.

init.hf and init.run decide the sizes, whatever model.name says; a size that a file or the command line gives all the
same must be equal to theirs. Where every size is given, as in the config that a run saves, nothing else is read.
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from trinity.config.hf_sizes import architecture, hf_sizes, zoo_name
from trinity.config.model import ZOO, ModelConfig
from trinity.config.paths import config_files, does_not_exist, expand_user
from trinity.errors import UserError

Sources = list[tuple[str, DictConfig]]
"""(where it was said, settings), later ones winning."""


def starting_model(sources: Sources) -> ModelConfig:
    """The model whose fields the sources then replace.

    Raises:
        UserError: an unknown model.name; an init that cannot be read, or has another size than the sources give.
    """
    name, given = _name(sources), dict(_given(sources))
    origin = _origin(sources)
    if origin is None or given.keys() >= {field.name for field in fields(ModelConfig)} - {"name"}:
        return ZOO[name]
    key, folder = origin
    sizes = _sizes(key, folder, sources)
    for field in architecture(sizes):
        if field in given and _differs(given[field][0], getattr(sizes, field)):
            value, where = given[field]
            raise UserError(
                f"model.{field}={value} in {where} is not the {getattr(sizes, field)} of {key}={folder}; "
                f"leave model.{field} out, or start from another model"
            )
    return replace(sizes, name=zoo_name(sizes, name))


def _name(sources: Sources) -> str:
    name = "smoke"
    for _, raw in sources:
        model = raw.get("model")
        if OmegaConf.is_dict(model) and model.get("name") is not None:
            name = model.name
    if not isinstance(name, str) or name not in ZOO:
        raise UserError(f"model.name={name} is not known; use one of {', '.join(ZOO)}")
    return name


def _given(sources: Sources) -> Iterator[tuple[str, tuple[Any, str]]]:
    """(field of the model, (value, where it is said)), but for the name."""
    for where, raw in sources:
        model = raw.get("model")
        if OmegaConf.is_dict(model):
            yield from ((str(key), (model[key], where)) for key in model if key != "name")


def _origin(sources: Sources) -> tuple[str, Path] | None:
    """init.hf or init.run with its folder; None where neither is given, or both, which is refused elsewhere."""
    chosen = {}
    for _, raw in sources:
        init = raw.get("init")
        if OmegaConf.is_dict(init):
            chosen |= {key: init[key] for key in ("hf", "run") if key in init}
    named = {f"init.{key}": value for key, value in chosen.items() if isinstance(value, str) and value}
    if len(named) != 1:
        return None
    ((key, folder),) = named.items()
    return key, Path(expand_user(folder, key))


def _sizes(key: str, folder: Path, sources: Sources) -> ModelConfig:
    if not folder.is_dir():
        saved = _saved_model(sources)
        if saved is None:
            raise UserError(f"{key}={does_not_exist(folder)}")
        return saved
    return hf_sizes(folder) if key == "init.hf" else _sizes_of_run(folder)


def _saved_model(sources: Sources) -> ModelConfig | None:
    """The model that the run's own directory holds: a run that resumes no longer needs what it was started from."""
    name, folder = "trinity", None
    for _, raw in sources:
        name = OmegaConf.select(raw, "run.name") or name
        folder = OmegaConf.select(raw, "run.dir") or folder
    home = Path(expand_user(str(folder), "run.dir")) if folder else Path("runs") / str(name)
    return _sizes_of_run(home) if config_files(home) else None


def _sizes_of_run(run: Path) -> ModelConfig:
    """The model of a run directory's newest config.

    Raises:
        UserError: it is no run directory, or that config is no Trinity model's.
    """
    files = config_files(run)
    if not files:
        raise UserError(f"{run} is not a run directory: it has no config.yaml")
    path = files[max(files)]
    try:
        return ModelConfig(**yaml.safe_load(path.read_text(encoding="utf-8"))["model"])
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"{path} describes no model ({' '.join(str(error).split())})") from None


def _differs(value: Any, size: float) -> bool:
    """Whether a value that is a number is another one; what is no number is left for the schema to refuse."""
    try:
        return float(value) != size
    except (TypeError, ValueError):
        return False
