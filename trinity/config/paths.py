"""Folders that a config names or that follow from it: ~ expanded, absolute, and the nearest one to a missing one."""

import difflib
import os
from dataclasses import replace
from glob import has_magic
from pathlib import Path

from trinity.config.run import RunConfig
from trinity.errors import UserError

PATHS = ("run.dir", "init.hf", "init.run", "data.train", "data.validation", "data.tokenizer", "checkpoint.url")
"""Keys that hold a path, or a map of names to paths. A URL may stand in the last four."""
_SHOWN = 8  # names of a folder that a message lists


def run_directory(config: RunConfig) -> Path:
    """Where the run lives: run.dir, else runs/<run.name>."""
    return Path(config.run.dir) if config.run.dir else Path("runs") / config.run.name


def tokenizer_folder(config: RunConfig) -> Path | None:
    """data.tokenizer, else the Hugging Face folder that the run started from; None where the config names neither."""
    folder = config.data.tokenizer or config.init.hf
    return Path(folder) if folder else None


def kept_tokenizer(run: Path) -> Path | None:
    """The copy of its tokenizer that a run directory holds; None without one."""
    folder = run / "tokenizer"
    return folder if (folder / "tokenizer.json").is_file() else None


def absolute_paths(config: RunConfig) -> RunConfig:
    """The same config with every local path absolute, so that it can be read from any working directory."""
    data, init = config.data, config.init
    train, validation = ({name: _absolute(place) for name, place in of.items()} for of in (data.train, data.validation))
    return replace(
        config,
        run=replace(config.run, dir=_absolute(config.run.dir)),
        init=replace(init, hf=_absolute(init.hf), run=_absolute(init.run)),
        data=replace(data, train=train, validation=validation, tokenizer=_absolute(data.tokenizer)),
        checkpoint=replace(config.checkpoint, url=_absolute(config.checkpoint.url)),
    )


def _absolute(place: str | None) -> str | None:
    """A path or pattern from the root on; a URL as it is."""
    return os.path.abspath(place) if place and "://" not in place else place


def config_files(run: Path) -> dict[int, Path]:
    """The configs of a run directory by the number of the start: config.yaml is 0, then config.N.yaml."""
    found = {0: run / "config.yaml"} if (run / "config.yaml").is_file() else {}
    for path in run.glob("config.*.yaml"):
        number = path.name.split(".")[1]
        if number.isdecimal():
            found[int(number)] = path
    return found


def expand_home(config: RunConfig) -> None:
    """Replace a leading ~ or ~user in every path of the config, in place.

    Raises:
        UserError: there is no such user, or run.name, which is no path, begins with ~.
    """
    for key in PATHS:
        section, name = (getattr(config, key.split(".")[0]), key.split(".")[1])
        value = getattr(section, name)
        if isinstance(value, dict):
            value |= {source: expand_user(place, f"{key}.{source}") for source, place in value.items()}
        elif value is not None:
            setattr(section, name, expand_user(value, key))
    if config.run.name.startswith("~") and not config.run.dir:
        raise UserError(
            f"run.name={config.run.name} is a name below runs/; for a folder write run.dir={config.run.name}"
        )


def expand_user(path: str, key: str) -> str:
    """The path with its leading ~ or ~user replaced by that home folder.

    Raises:
        UserError: there is no such user; `key` names the path.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = expanded.split("/")[0]
        raise UserError(f"{key}={path}: {user} is no user's home folder here; write the whole path, or ./{path}")
    return expanded


def check_paths(config: RunConfig, fresh: bool) -> None:
    """Refuse local paths that do not exist; patterns and URLs are left to whoever opens them.

    Args:
        config: the run.
        fresh: whether this is the run's first start; later ones read neither init nor, necessarily, the tokenizer.
    Raises:
        UserError: naming the key and the nearest path that exists.
    """
    data, init = config.data, config.init
    named = {f"data.train.{name}": place for name, place in data.train.items()}
    named |= {f"data.validation.{name}": place for name, place in data.validation.items()}
    if fresh:
        named |= {"data.tokenizer": data.tokenizer, "init.hf": init.hf, "init.run": init.run}
    for key, place in named.items():
        if place and "://" not in place and not os.path.exists(place) and not has_magic(place):
            raise UserError(f"{key}={does_not_exist(place)}")


def does_not_exist(path: str | Path) -> str:
    """The end of a sentence about a path that does not exist: with the nearest one, or with what is there instead."""
    near, parent = nearest_path(path), _deepest(Path(path))
    if near:
        return f"{path} does not exist; did you mean {near}?"
    if parent.is_dir() and parent != Path("/"):
        names = _names(parent)
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        where = "the current folder" if parent == Path(".") else parent
        return f"{path} does not exist; {where} holds {', '.join(names[:_SHOWN]) or 'nothing'}{more}"
    return f"{path} does not exist; check the path"


def nearest_path(path: str | Path) -> Path | None:
    """The existing path that is most like one that does not exist, None where nothing is like it.

    The first part of it that is missing is compared with what lies beside it; the rest is kept if it exists there.
    """
    path = Path(path)
    parent = _deepest(path)
    missing, *rest = path.parts[len(parent.parts) :] or [""]
    close = difflib.get_close_matches(missing, _names(parent), n=1)
    if not close:
        return None
    near = parent / close[0]
    if rest:
        whole = near.joinpath(*rest)
        return whole if os.path.exists(whole) else nearest_path(whole) or near
    return near


def _deepest(path: Path) -> Path:
    """The last of the path's parents that exists."""
    return next((parent for parent in path.parents if os.path.exists(parent)), Path("."))


def _names(folder: Path) -> list[str]:
    """What a folder holds, sorted; nothing where it cannot be read."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []
