"""The tokenizer of a run: copied into the run directory when the run starts.

Resumed runs, exports and tools use the copy, so the folder that it was copied from may move or go. A run directory
without a copy uses the folder that its config names, and gets a copy at the next start.
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
    """Folder of a run's tokenizer: the copy in the run directory, else the one its config names; None without one."""
    return kept_tokenizer(run) or tokenizer_folder(config)


def tokenizer_to_read(config: RunConfig, beside: Path) -> Path | None:
    """Folder of the tokenizer that decodes a config's data, whether or not its run has started.

    Args:
        config: the run's.
        beside: folder of the config file; if that is a run directory that was moved, it holds the copy.
    """
    named = tokenizer_folder(config)
    if named is not None and (named / "tokenizer.json").is_file():
        return named
    return kept_tokenizer(run_directory(config)) or kept_tokenizer(beside) or named


def tokenizer_at_start(config: RunConfig, run: Path, resumes: bool) -> Path | None:
    """Folder of the tokenizer of a run that is about to start or to resume; None without one.

    Args:
        config: of this start.
        run: the run directory.
        resumes: whether the run has a checkpoint; then its tokenizer is fixed, but data.tokenizer may name any copy.
    Raises:
        UserError: data.tokenizer differs from the run's tokenizer, or there are prompts but no tokenizer.
    """
    folder = _for_resumed_run(config, run) if resumes else _for_new_run(config, run)
    for key, given in {"prompts": config.evaluation.prompts, "needles": config.evaluation.needles.lengths}.items():
        if folder is None and given:
            raise UserError(
                f"evaluation.{key} are texts and there is no tokenizer; set data.tokenizer, or leave them out"
            )
    return folder


def _for_new_run(config: RunConfig, run: Path) -> Path | None:
    """The one that the config names, else that of the run that it starts from."""
    named = tokenizer_folder(config)
    if named is None and config.init.run:
        named = run_tokenizer(Path(config.init.run), newest_config(Path(config.init.run)))
    return named or kept_tokenizer(run)


def _for_resumed_run(config: RunConfig, run: Path) -> Path | None:
    """The run's own, which must equal the one that the config names if that exists."""
    own = run_tokenizer(run, newest_config(run))
    named = Path(config.data.tokenizer) if config.data.tokenizer else None
    if own is None or not (own / "tokenizer.json").is_file():  # the run's shards and texts are checked against `named`
        return named or own or tokenizer_folder(config)
    if named is None:
        return own
    if not named.exists():
        say(f"note: data.tokenizer={named} does not exist; the run continues with its copy in {own}")
    elif fingerprint(named) != fingerprint(own):
        raise UserError(
            f"{run} was begun with another tokenizer than data.tokenizer={named}; leave data.tokenizer out to continue "
            f"with its own in {own}, or start a new run with another run.dir"
        )
    return own


def on_this_node(folder: Path | None, config: RunConfig) -> Path | None:
    """The folder that rank 0 chose, or the one that the config names if the run directory is on no shared disk."""
    return folder if folder is None or folder.exists() else tokenizer_folder(config) or folder


def with_tokenizer(config: RunConfig, folder: Path | None) -> RunConfig:
    """The config with this folder as data.tokenizer."""
    return config if folder is None else replace(config, data=replace(config.data, tokenizer=str(folder)))


def keep_tokenizer(folder: Path, run: Path, replace_copy: bool) -> Path:
    """Copy a tokenizer's files into a run directory.

    Args:
        folder: the tokenizer.
        run: the run directory.
        replace_copy: replace a copy from an earlier start, as the run has no checkpoint yet.
    Returns:
        folder of the copy.
    """
    copy = run / "tokenizer"
    if folder.resolve() == copy.resolve() or (kept_tokenizer(run) and not replace_copy):
        return copy
    make_folder(copy)
    for name in FILES:
        if not (folder / name).is_file():
            (copy / name).unlink(missing_ok=True)
    copy_tokenizer(folder, copy)
    return copy
