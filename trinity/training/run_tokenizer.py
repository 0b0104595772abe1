"""The tokenizer of a run: copied into the run directory when the run starts.

From then on the copy is the run's tokenizer, whatever becomes of the folder that it came from: resumed runs, exports
and tools use it. Run directories without a copy use the folder that their config names, and get one at the next start.
"""

from dataclasses import replace
from pathlib import Path

from trinity.config.paths import kept_tokenizer, run_directory, tokenizer_folder
from trinity.config.run import RunConfig
from trinity.data.tokenizer.tokenizer import fingerprint
from trinity.errors import UserError
from trinity.interop.tokenizer_files import FILES, copy_tokenizer
from trinity.io.local import make_folder
from trinity.run_directory import newest_config
from trinity.terminal import say


def run_tokenizer(run: Path, config: RunConfig) -> Path | None:
    """The folder of a run's tokenizer: the copy in the run directory, else what its config names; None without one."""
    return kept_tokenizer(run) or tokenizer_folder(config)


def tokenizer_to_read(config: RunConfig, beside: Path) -> Path | None:
    """The tokenizer to decode what a config reads, whether or not its run has begun.

    Args:
        config: the run's.
        beside: folder of the config file; where that is a run directory that was moved, its copy is there.
    """
    named = tokenizer_folder(config)
    if named is not None and (named / "tokenizer.json").is_file():
        return named
    return kept_tokenizer(run_directory(config)) or kept_tokenizer(beside) or named


def tokenizer_at_start(config: RunConfig, run: Path, resumes: bool) -> Path | None:
    """The tokenizer of a run that is about to start or to go on.

    Args:
        config: of this start.
        run: the run directory.
        resumes: whether the run has a checkpoint; then its tokenizer is fixed, and may lie anywhere.
    Raises:
        UserError: data.tokenizer is another one than the run began with, or prompts are given without any.
    """
    folder = _of_resumed(config, run) if resumes else _of_new(config, run)
    if folder is None and config.evaluation.prompts:
        raise UserError("evaluation.prompts are texts and there is no tokenizer; set data.tokenizer, or leave them out")
    return folder


def _of_new(config: RunConfig, run: Path) -> Path | None:
    """What the config names, else that of the run it starts from."""
    named = tokenizer_folder(config)
    if named is None and config.init.run:
        named = run_tokenizer(Path(config.init.run), newest_config(Path(config.init.run)))
    return named or kept_tokenizer(run)


def _of_resumed(config: RunConfig, run: Path) -> Path | None:
    own = run_tokenizer(run, newest_config(run))
    asked = Path(config.data.tokenizer) if config.data.tokenizer else None
    if own is None or not (own / "tokenizer.json").is_file():  # shards and texts are compared with what is asked for
        return asked or own or tokenizer_folder(config)
    if asked is None:
        return own
    if not asked.exists():
        say(f"note: data.tokenizer={asked} does not exist; the run goes on with its copy in {own}")
    elif fingerprint(asked) != fingerprint(own):
        raise UserError(
            f"{run} was begun with another tokenizer than data.tokenizer={asked}; leave data.tokenizer out to go on "
            f"with its own in {own}, or start afresh with another run.dir"
        )
    return own


def on_this_node(folder: Path | None, config: RunConfig) -> Path | None:
    """The folder that the first rank chose, or what the config names where the run directory is on no shared disk."""
    return folder if folder is None or folder.exists() else tokenizer_folder(config) or folder


def with_tokenizer(config: RunConfig, folder: Path | None) -> RunConfig:
    """The config with this folder as data.tokenizer."""
    return config if folder is None else replace(config, data=replace(config.data, tokenizer=str(folder)))


def keep_tokenizer(folder: Path, run: Path, anew: bool) -> Path:
    """Copy a tokenizer's files into a run directory.

    Args:
        folder: the tokenizer.
        run: the run directory.
        anew: whether a copy that is there already is replaced: the run has no checkpoint yet.
    Returns:
        the copy.
    """
    copy = run / "tokenizer"
    if folder.resolve() == copy.resolve() or (kept_tokenizer(run) and not anew):
        return copy
    make_folder(copy)
    for name in FILES:
        if not (folder / name).is_file():
            (copy / name).unlink(missing_ok=True)
    copy_tokenizer(folder, copy)
    return copy
