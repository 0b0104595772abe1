"""Where a start goes on from: its own newest checkpoint, another run's (init.keep=all), or nothing.

The config is compared with that of the run that made the checkpoint, and the steps made so far come from the
checkpoint: a new batch, ramp or phase holds from there on.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from trinity.checkpoint.directory import CheckpointDirectory, Note
from trinity.checkpoint.load import load_on_this_rank
from trinity.config.changes import check_changes
from trinity.config.paths import run_directory
from trinity.config.run import RunConfig
from trinity.data.stream.batch_schedule import BatchHistory
from trinity.data.stream.stream import position_of
from trinity.errors import UserError
from trinity.parallel.collectives import run_on_all_ranks, run_on_rank0
from trinity.run_directory import newest_config, whose_run
from trinity.terminal import say
from trinity.training.build import batch_plan
from trinity.training.learning_rate import check_decay

HISTORY = "run.batch_history"
"""Key of the batch history in a checkpoint."""


class Origin(NamedTuple):
    """The checkpoint that a start goes on from.

    checkpoints: the directory that holds it.
    step: 0 for none.
    history: the steps made until then.
    own: whether it is this run's, and not another's.
    """

    checkpoints: CheckpointDirectory
    step: int = 0
    history: BatchHistory = BatchHistory()
    own: bool = True


def find_origin(config: RunConfig, accepted: list[str], path: Path, note: Note) -> Origin:
    """The newest checkpoint that is not damaged, if the config may go on from it; every rank calls this.

    Args:
        config: what is asked for.
        accepted: keys given with --accept-change.
        path: the run directory.
        note: called with each damaged checkpoint that is passed over.
    Raises:
        UserError: the config differs in what must not change, or there is no such checkpoint.
    """
    checkpoints = run_on_all_ranks(CheckpointDirectory.at, path, config.checkpoint.url)
    run_on_rank0(_check_own, config, accepted, path, checkpoints)
    step = checkpoints.newest_intact(note)
    if step:
        history = run_on_rank0(lambda: history_of(checkpoints, step, newest_config(path)))
        return Origin(checkpoints, step, history)
    if not config.init.run or config.init.keep != "all":
        return Origin(checkpoints)
    other = Path(config.init.run)
    others = run_on_rank0(CheckpointDirectory.of_run, other)
    step = others.pick_intact(config.init.step, note)
    history = run_on_rank0(_check_against, config, accepted, other, others, step)
    return Origin(others, step, history, own=False)


def history_of(checkpoints: CheckpointDirectory, step: int, before: RunConfig) -> BatchHistory:
    """The steps that a checkpoint's run made, read by this process alone.

    A checkpoint of an older version does not hold them. They are then taken to be those of the run's last config;
    where the data shows that other ones were read, tokens are counted by data.sequence_length.

    Args:
        checkpoints, step: which checkpoint.
        before: config of its run.
    """
    path = checkpoints.path_of(step)
    stored = load_on_this_rank(path, HISTORY)
    if stored:
        return BatchHistory.from_rows(stored[HISTORY].tolist())
    assumed = batch_plan(before).history(step)
    data = load_on_this_rank(path, "data.k") | load_on_this_rank(path, "data.jumped")
    if len(data) < 2:  # damaged; loading says so
        return assumed
    read = position_of(int(data["data.k"]), data["data.jumped"].tolist())
    if read == assumed.sequences:
        return assumed
    return assumed._replace(sequences=read, tokens=read * before.data.sequence_length)


def history_tensor(history: BatchHistory) -> torch.Tensor:
    """int64 [segments + 1, 6], as a checkpoint holds it."""
    return torch.tensor(history.rows())


def _check_own(config: RunConfig, accepted: list[str], path: Path, checkpoints: CheckpointDirectory) -> None:
    """Refuse what may not change after the newest checkpoint that can be read."""
    before = newest_config(path) if (path / "config.yaml").is_file() else None
    _check_location(checkpoints, before, path)
    for step in reversed(checkpoints.complete_steps()):
        try:
            history_of(checkpoints, step, before)
        except UserError:  # damaged; newest_intact says so
            continue
        _check_against(config, accepted, path, checkpoints, step)
        return


def _check_location(checkpoints: CheckpointDirectory, before: RunConfig | None, path: Path) -> None:
    """Refuse a start that would lose sight of this run's checkpoints, or that would continue another run's.

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


def _check_against(
    config: RunConfig, accepted: list[str], path: Path, checkpoints: CheckpointDirectory, step: int
) -> BatchHistory:
    """Refuse what may not differ from the run in `path`, whose checkpoint of `step` is gone on from."""
    before = newest_config(path)
    history = history_of(checkpoints, step, before)
    seen = batch_plan(before, history).at(step - 1).tokens
    instead = ["set init.keep=optimizer"] if path != run_directory(config) else []
    changed = check_changes(before, config, seen, accepted, whose_run(path, before, step), *instead)
    changed += check_decay(before, config, step, history.tokens, accepted, str(path))
    if changed:
        say(f"resuming with other settings: {', '.join(changed)}")
    return history
