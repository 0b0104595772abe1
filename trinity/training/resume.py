"""Choose the checkpoint that a start resumes from, and compare the config with that of the run that wrote it.

The choice is the run's own newest intact checkpoint, another run's (init.keep=all), or none. The steps made so far come
from the checkpoint; a new batch size, ramp or phase in the config applies to the steps after them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from trinity.checkpoint.directory import CheckpointDirectory, Note
from trinity.checkpoint.load import empty_tensors, load_on_this_rank
from trinity.checkpoint.save import State
from trinity.config.changes import check_changes
from trinity.config.paths import config_files, run_directory
from trinity.config.run import KernelsConfig, RunConfig
from trinity.data.stream.batch_schedule import BatchHistory
from trinity.data.stream.stream import position_of
from trinity.errors import UserError
from trinity.io.remote_path import AnyPath
from trinity.parallel.collectives import run_on_all_ranks, run_on_rank0
from trinity.run_directory import describe_run, newest_config
from trinity.terminal import say
from trinity.training.build import batch_plan, fp32_products
from trinity.training.lr_schedule_checks import check_decay
from trinity_kernels.linear import has_onednn

HISTORY = "run.batch_history"
"""Key of the batch history in a checkpoint."""


class Origin(NamedTuple):
    """The checkpoint that a start resumes from.

    checkpoints: the directory that holds it.
    step: the steps made so far; 0 without a checkpoint.
    history: the batches of these steps.
    own: whether this run wrote it, not another run (init.keep=all).
    """

    checkpoints: CheckpointDirectory
    step: int = 0
    history: BatchHistory = BatchHistory()
    own: bool = True


def find_origin(config: RunConfig, accepted: list[str], path: Path, note: Note) -> Origin:
    """Find the newest intact checkpoint, and check that the config may resume from it; every rank calls this.

    Args:
        config: of this start.
        accepted: keys given with --accept-change.
        path: the run directory.
        note: called on rank 0 for each damaged checkpoint that is skipped.
    Raises:
        UserError: the config differs in a key that must not change, or the requested checkpoint is missing or damaged.
    """
    checkpoints = run_on_all_ranks(CheckpointDirectory.at, path, config.checkpoint.url)
    run_on_rank0(_check_own_run, config, accepted, path, checkpoints)
    step = checkpoints.newest_intact(note)
    if step:
        history = run_on_rank0(lambda: history_of(checkpoints, step, newest_config(path)))
        return Origin(checkpoints, step, history)
    if not config.init.run or config.init.keep != "all":
        return Origin(checkpoints)
    init_run = Path(config.init.run)
    init_checkpoints = run_on_rank0(CheckpointDirectory.of_run, init_run)
    step = init_checkpoints.pick_intact(config.init.step, note)
    history = run_on_rank0(_check_config, config, accepted, init_run, init_checkpoints, step)
    return Origin(init_checkpoints, step, history, own=False)


def fp32_products_of_run(config: RunConfig, path: Path, device: torch.device) -> Literal["torch", "onednn"]:
    """Resolve kernels.linear: `auto` is what the run's last start took, so that its bits stay the same.

    Args:
        config: of this start.
        path: the run directory, which may not exist yet.
        device: of the run.
    """
    kernels = config.kernels
    if kernels.linear == "auto" and config_files(path):
        kernels = replace(kernels, linear=newest_config(path).kernels.linear)
        if kernels.linear == "onednn" and not has_onednn():  # another torch
            kernels = KernelsConfig()
    return fp32_products(kernels, device)


def history_of(checkpoints: CheckpointDirectory, step: int, before: RunConfig) -> BatchHistory:
    """Batch history of the steps before a checkpoint, read on this process alone.

    A checkpoint of an older version has no history. The steps are then assumed to follow the run's last config; if the
    position in the data disagrees, tokens are counted as sequences read × data.sequence_length.

    Args:
        checkpoints, step: the checkpoint.
        before: config of the run that wrote it.
    """
    path = checkpoints.path_of(step)
    stored = load_on_this_rank(path, HISTORY)
    if stored:
        return BatchHistory.from_rows(stored[HISTORY].tolist())
    assumed = batch_plan(before).history(step)
    data = load_on_this_rank(path, "data.k") | load_on_this_rank(path, "data.jumped")
    if len(data) < 2:  # damaged: load() raises an error later
        return assumed
    read = position_of(int(data["data.k"]), data["data.jumped"].tolist())
    if read == assumed.sequences:
        return assumed
    return assumed._replace(sequences=read, tokens=read * before.data.sequence_length)


def check_optimizer_state(own: State, path: AnyPath, run: str, frozen: bool = False) -> None:
    """Refuse init.keep=optimizer where the checkpoint holds the optimizer state of other parameters.

    Args:
        own: the state of this run's optimizers, "optim.…".
        path: the checkpoint's folder.
        run: init.run, for the message.
        frozen: whether train.only freezes parameters, whose state in the checkpoint is left out.
    Raises:
        UserError: naming a tensor that differs, and what to do.
    """
    shapes = {name: list(tensor.shape) for name, tensor in own.items()}
    saved = {name: list(tensor.shape) for name, tensor in empty_tensors(path, "optim.").items()}
    compared = shapes.keys() if frozen else shapes.keys() | saved.keys()
    different = sorted(name for name in compared if shapes.get(name) != saved.get(name))
    if not different:
        return
    first = different[0]
    if first not in saved:
        reason = f"lacks {first}"
    elif first not in shapes:
        reason = f"also holds {first}"
    else:
        reason = f"holds {first} of shape {saved[first]}, not {shapes[first]}"
    raise UserError(
        f"init.keep=optimizer needs the optimizer state of the same parameters, and {run} {reason} ({len(different)} "
        "tensors differ); train the same parameters as that run with the same optim.router, or set init.keep=weights"
    )


def history_tensor(history: BatchHistory) -> torch.Tensor:
    """The history as a checkpoint stores it: int64 [segments + 1, 6]."""
    return torch.tensor(history.rows())


def _check_own_run(config: RunConfig, accepted: list[str], path: Path, checkpoints: CheckpointDirectory) -> None:
    """Check location and config against this run's newest readable checkpoint."""
    before = newest_config(path) if (path / "config.yaml").is_file() else None
    _check_location(checkpoints, before, path)
    if before is None:
        return
    for step in reversed(checkpoints.complete_steps()):
        try:
            history_of(checkpoints, step, before)
        except UserError:  # damaged: newest_intact reports it
            continue
        _check_config(config, accepted, path, checkpoints, step)
        return


def _check_location(checkpoints: CheckpointDirectory, before: RunConfig | None, path: Path) -> None:
    """Refuse a checkpoint.url with fewer steps than the previous one, and checkpoints of an unknown run.

    Args:
        checkpoints: where this start reads and writes checkpoints.
        before: config of the run's last start; None where the run directory has none.
        path: the run directory.
    Raises:
        UserError: naming the folders.
    """
    steps = checkpoints.complete_steps()
    if before is None:
        if steps:
            raise UserError(
                f"{checkpoints.folder} holds checkpoints, and {path} has no config.yaml that says of which run; "
                "put that file back, or give another run.dir or checkpoint.url"
            )
        return
    previous = CheckpointDirectory.at(path, before.checkpoint.url)
    if previous.folder == checkpoints.folder:
        return
    newest, newest_before = max(steps, default=0), max(previous.complete_steps(), default=0)
    if newest < newest_before:
        raise UserError(
            f"the checkpoints of {path} are in {previous.folder} up to step {newest_before}, and in "
            f"{checkpoints.folder} up to step {newest}; copy them there or give the old checkpoint.url back"
        )


def _check_config(
    config: RunConfig, accepted: list[str], path: Path, checkpoints: CheckpointDirectory, step: int
) -> BatchHistory:
    """Compare the config with that of the run in `path` that wrote the checkpoint; return the checkpoint's history.

    Raises:
        UserError: naming the keys that must not change, and the run.
    """
    before = newest_config(path)
    history = history_of(checkpoints, step, before)
    tokens_read = batch_plan(before, history).at(step - 1).tokens
    remedies = ["set init.keep=optimizer"] if path != run_directory(config) else []
    changed_keys = check_changes(before, config, tokens_read, accepted, describe_run(path, before, step), *remedies)
    changed_keys += check_decay(before, config, step, history.tokens, accepted, str(path))
    if changed_keys:
        say(f"resuming with other settings: {', '.join(changed_keys)}")
    return history
