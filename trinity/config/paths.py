"""Folders that follow from a config."""

from pathlib import Path

from trinity.config.run import RunConfig


def run_directory(config: RunConfig) -> Path:
    """Where the run lives: run.dir, else runs/<run.name>."""
    return Path(config.run.dir) if config.run.dir else Path("runs") / config.run.name


def tokenizer_folder(config: RunConfig) -> Path | None:
    """data.tokenizer, else the Hugging Face folder that the run started from; None where the config names neither."""
    folder = config.data.tokenizer or config.init.hf
    return Path(folder) if folder else None
