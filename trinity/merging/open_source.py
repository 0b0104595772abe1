"""Open a model by the name that a recipe gives it."""

import os
import re
from pathlib import Path

from trinity.config.paths import missing_path_hint
from trinity.errors import UserError
from trinity.merging.sources import FolderSource, Source

_STEP = re.compile(r"(.+)@(\d+)")


def open_source(text: str) -> Source:
    """Open a model of a recipe: a Hugging Face folder, a run directory (its newest checkpoint), or RUN_DIR@step.

    Raises:
        UserError: there is no such model, or it cannot be merged.
    """
    folder, step = Path(os.path.expanduser(text)), None  # an unknown ~user stays, and does not exist
    if not folder.exists() and (match := _STEP.fullmatch(text)):
        folder, step = Path(os.path.expanduser(match[1])), int(match[2])
    if not folder.exists():
        raise UserError(f"{missing_path_hint(folder)}; a model of the Hub must be fetched first: hf download NAME")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give a Hugging Face folder, a run directory or RUN_DIR@step")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} is a LoRA adapter; merge it into its base model first (peft: merge_and_unload)")
    if (folder / "config.json").exists() and step is None:
        return FolderSource(text, folder)
    if (folder / "config.yaml").exists():
        from trinity.merging.run_source import RunSource  # imports torch.distributed, which folders do not need

        return RunSource(text, folder, step)
    if step is not None:
        raise UserError(f"{folder} is not a run directory, so it has no checkpoint of step {step}")
    raise UserError(
        f"{folder} has neither a config.json nor a config.yaml; give a Hugging Face folder or a run directory"
    )
