"""Where a model's sizes come from: the zoo (model.name), a Hugging Face folder (init.hf) or another run (init.run).

init.hf and init.run win over model.name. A size that the config also gives must equal the one of the folder or run. If
the config gives every size, as a saved config does, neither the folder nor the run is read. Where it is missing,
model.name stands in for it, so that a config can be planned before its initial weights are there; the start of a run
refuses the missing folder (trinity.config.paths.check_paths).
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from trinity.config.hf_config import architecture, read_hf_config, zoo_name
from trinity.config.model import ZOO, ModelConfig
from trinity.config.paths import config_files, expand_user, missing_path_hint
from trinity.errors import UserError

Sources = list[tuple[str, DictConfig]]
"""(name of the source, its settings); later sources win."""


def initial_model(sources: Sources) -> ModelConfig:
    """The model's sizes before the `model` fields of the sources are applied.

    Raises:
        UserError: model.name is unknown; what init names cannot be read, or has another size than the sources give.
    """
    name, given = _model_name(sources), dict(_given_sizes(sources))
    origin = _init_origin(sources)
    if origin is None or given.keys() >= {field.name for field in fields(ModelConfig)} - {"name"}:
        return ZOO[name]
    key, folder = origin
    sizes = _sizes(key, folder, sources)
    if sizes is None:
        return ZOO[name]
    for field in architecture(sizes):
        if field in given and _differs(given[field][0], getattr(sizes, field)):
            value, where = given[field]
            raise UserError(
                f"model.{field}={value} in {where} is not the {getattr(sizes, field)} of {key}={folder}; "
                f"leave model.{field} out, or start from another model"
            )
    return replace(sizes, name=zoo_name(sizes, name))


def _model_name(sources: Sources) -> str:
    name = "smoke"
    for _, raw in sources:
        model = raw.get("model")
        if OmegaConf.is_dict(model) and model.get("name") is not None:
            name = model.name
    if not isinstance(name, str) or name not in ZOO:
        raise UserError(f"model.name={name} is not known; use one of {', '.join(ZOO)}")
    return name


def _given_sizes(sources: Sources) -> Iterator[tuple[str, tuple[Any, str]]]:
    """(field of ModelConfig, (value, name of its source)) for each size that the sources give."""
    for where, raw in sources:
        model = raw.get("model")
        if OmegaConf.is_dict(model):
            yield from ((str(key), (model[key], where)) for key in model if key != "name")


def _init_origin(sources: Sources) -> tuple[str, Path] | None:
    """("init.hf" or "init.run", folder); None if neither is given, or both, which trinity.config.check refuses."""
    init_keys: dict[str, Any] = {}
    for _, raw in sources:
        init = raw.get("init")
        if OmegaConf.is_dict(init):
            init_keys |= {key: init[key] for key in ("hf", "run") if key in init}
    named = {f"init.{key}": value for key, value in init_keys.items() if isinstance(value, str) and value}
    if len(named) != 1:
        return None
    ((key, folder),) = named.items()
    return key, Path(expand_user(folder, key))


def _sizes(key: str, folder: Path, sources: Sources) -> ModelConfig | None:
    """The sizes of a folder or run; None if it is missing and a source gives model.name."""
    if not folder.is_dir():
        saved = _sizes_of_own_run(sources)
        if saved is None and not any(OmegaConf.select(raw, "model.name") for _, raw in sources):
            raise UserError(f"{key}={missing_path_hint(folder)}")
        return saved
    return read_hf_config(folder) if key == "init.hf" else _sizes_of_run(folder)


def _sizes_of_own_run(sources: Sources) -> ModelConfig | None:
    """The sizes saved in the run's own directory, if it exists: a resumed run does not need init's folder any more."""
    name, folder = "trinity", None
    for _, raw in sources:
        name = OmegaConf.select(raw, "run.name") or name
        folder = OmegaConf.select(raw, "run.dir") or folder
    directory = Path(expand_user(str(folder), "run.dir")) if folder else Path("runs") / str(name)
    return _sizes_of_run(directory) if config_files(directory) else None


def _sizes_of_run(run: Path) -> ModelConfig:
    """The model of a run directory's newest config.

    Raises:
        UserError: it is not a run directory, or the config describes no Trinity model.
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
    """Whether `value` is a number other than `size`; the schema refuses what is not a number."""
    try:
        return float(value) != size
    except (TypeError, ValueError):
        return False
