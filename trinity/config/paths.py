"""Paths of a config: run directory, tokenizer folder, ~ and absolute paths, and hints for paths that do not exist."""

import difflib
import os
from dataclasses import replace
from glob import has_magic
from pathlib import Path

from trinity.config.run import RunConfig
from trinity.errors import UserError

PATHS = ("run.dir", "init.hf", "init.run", "data.train", "data.validation", "data.tokenizer", "checkpoint.url")
"""Keys that hold a path, or a map of names to paths. The last four may also hold a URL."""
_LISTED = 8  # most entries of a folder that a message lists


def run_directory(config: RunConfig) -> Path:
    """run.dir, or by default runs/<run.name>."""
    return Path(config.run.dir) if config.run.dir else Path("runs") / config.run.name


def tokenizer_folder(config: RunConfig) -> Path | None:
    """data.tokenizer, or by default init.hf; None if the config names neither."""
    folder = config.data.tokenizer or config.init.hf
    return Path(folder) if folder else None


def kept_tokenizer(run: Path) -> Path | None:
    """The copy of the tokenizer in a run directory; None if there is none."""
    folder = run / "tokenizer"
    return folder if (folder / "tokenizer.json").is_file() else None


def absolute_paths(config: RunConfig) -> RunConfig:
    """A copy of the config with every local path absolute, so that it can be read from any working directory."""
    data, init = config.data, config.init
    train = {name: _absolute(path) for name, path in data.train.items()}
    validation = {name: _absolute(path) for name, path in data.validation.items()}
    return replace(
        config,
        run=replace(config.run, dir=_absolute_or_none(config.run.dir)),
        init=replace(init, hf=_absolute_or_none(init.hf), run=_absolute_or_none(init.run)),
        data=replace(data, train=train, validation=validation, tokenizer=_absolute_or_none(data.tokenizer)),
        checkpoint=replace(config.checkpoint, url=_absolute_or_none(config.checkpoint.url)),
    )


def _absolute(path: str) -> str:
    """A path or pattern made absolute; a URL and an empty text unchanged."""
    return os.path.abspath(path) if path and "://" not in path else path


def _absolute_or_none(path: str | None) -> str | None:
    return None if path is None else _absolute(path)


def config_files(run: Path) -> dict[int, Path]:
    """Number of the start → the config that it saved in a run directory: 0 → config.yaml, N → config.N.yaml."""
    files = {0: run / "config.yaml"} if (run / "config.yaml").is_file() else {}
    for path in run.glob("config.*.yaml"):
        number = path.name.split(".")[1]
        if number.isdecimal():
            files[int(number)] = path
    return files


def expand_home(config: RunConfig) -> None:
    """Replace a leading ~ or ~user in every path of the config, in place.

    Raises:
        UserError: there is no such user; or run.name, which is not a path, begins with ~.
    """
    for key in PATHS:
        section, name = (getattr(config, key.split(".")[0]), key.split(".")[1])
        value = getattr(section, name)
        if isinstance(value, dict):
            value |= {source: expand_user(path, f"{key}.{source}") for source, path in value.items()}
        elif value is not None:
            setattr(section, name, expand_user(value, key))
    if config.run.name.startswith("~") and not config.run.dir:
        raise UserError(
            f"run.name={config.run.name} is a name below runs/; for a folder write run.dir={config.run.name}"
        )


def expand_user(path: str, key: str) -> str:
    """Replace a leading ~ or ~user by that home folder.

    Raises:
        UserError: there is no such user; the message names `key`.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = expanded.split("/")[0]
        raise UserError(f"{key}={path}: {user} is no user's home folder here; write the whole path, or ./{path}")
    return expanded


def check_paths(config: RunConfig, fresh: bool) -> None:
    """Refuse local paths that do not exist. Patterns and URLs are checked where they are opened.

    Args:
        config: the run.
        fresh: whether this is the run's first start. Later starts do not read init, and may not read the tokenizer.
    Raises:
        UserError: naming the key and the nearest path that exists.
    """
    data, init = config.data, config.init
    paths: dict[str, str | None] = {f"data.train.{name}": path for name, path in data.train.items()}
    paths |= {f"data.validation.{name}": path for name, path in data.validation.items()}
    if fresh:
        paths |= {"data.tokenizer": data.tokenizer, "init.hf": init.hf, "init.run": init.run}
    for key, path in paths.items():
        if path and "://" not in path and not os.path.exists(path) and not has_magic(path):
            raise UserError(f"{key}={missing_path_hint(path)}")


def missing_path_hint(path: str | Path) -> str:
    """ "PATH does not exist", with the nearest path that does, or with what its folder holds."""
    near, parent = nearest_path(path), _existing_parent(Path(path))
    if near:
        return f"{path} does not exist; did you mean {near}?"
    if parent.is_dir() and parent != Path("/"):
        names = _names(parent)
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        folder = "the current folder" if parent == Path(".") else parent
        return f"{path} does not exist; {folder} holds {', '.join(names[:_LISTED]) or 'nothing'}{more}"
    return f"{path} does not exist; check the path"


def nearest_path(path: str | Path) -> Path | None:
    """The existing path most similar to a missing one; None if there is none.

    The first missing part is compared with the entries of its parent folder; the rest is kept if it exists there.
    """
    path = Path(path)
    parent = _existing_parent(path)
    missing, *rest = path.parts[len(parent.parts) :] or [""]
    close = difflib.get_close_matches(missing, _names(parent), n=1)
    if not close:
        return None
    near = parent / close[0]
    if rest:
        candidate = near.joinpath(*rest)
        return candidate if os.path.exists(candidate) else nearest_path(candidate) or near
    return near


def _existing_parent(path: Path) -> Path:
    """The deepest parent folder that exists."""
    return next((parent for parent in path.parents if os.path.exists(parent)), Path("."))


def _names(folder: Path) -> list[str]:
    """Names of the entries of a folder, sorted, without hidden ones; empty if it cannot be read."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []
