"""Folders that follow from a config, and its paths made absolute."""

import os
from dataclasses import replace
from pathlib import Path

from trinity.config.run import RunConfig


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
