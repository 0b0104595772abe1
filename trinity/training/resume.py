"""Where a start goes on from: its own newest checkpoint, another run's (init.keep=all), or nothing.

The config is compared with that of the run that made the checkpoint, and the steps made so far come from the
checkpoint: a new batch, ramp or phase holds from there on.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from trinity.checkpoint.directory import (
    Home,
    Note,
    check_home,
    complete_steps,
    home_of,
    home_of_run,
    newest_intact,
    pick_intact,
    step_folder,
)
from trinity.checkpoint.load import read_alone
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

    home: whose it is.
    step: 0 for none.
    history: the steps made until then.
    own: whether it is this run's, and not another's.
    """

    home: Home
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
    home = run_on_all_ranks(lambda: home_of(config.checkpoint.url, path))
    run_on_rank0(lambda: _check_own(config, accepted, path, home))
    step = newest_intact(home, note)
    if step:
        return Origin(home, step, run_on_rank0(lambda: history_of(home, step, newest_config(path))))
    if not config.init.run or config.init.keep != "all":
        return Origin(home)
    other = Path(config.init.run)
    home = run_on_rank0(lambda: home_of_run(other))
    step = pick_intact(home, config.init.step, note)
    return Origin(home, step, run_on_rank0(lambda: _check_against(config, accepted, other, home, step)), own=False)


def history_of(home: Home, step: int, before: RunConfig) -> BatchHistory:
    """The steps that a checkpoint's run made, read by this process alone.

    A checkpoint of an older version does not hold them. They are then taken to be those of the run's last config;
    where the data shows that other ones were read, tokens are counted by data.sequence_length.

    Args:
        home, step: which checkpoint.
        before: config of its run.
    """
    folder = step_folder(home, step)
    stored = read_alone(folder, HISTORY)
    if stored:
        return BatchHistory.from_rows(stored[HISTORY].tolist())
    assumed = batch_plan(before).history(step)
    data = read_alone(folder, "data.k") | read_alone(folder, "data.jumped")
    if len(data) < 2:  # damaged; loading says so
        return assumed
    read = position_of(int(data["data.k"]), data["data.jumped"].tolist())
    if read == assumed.sequences:
        return assumed
    return assumed._replace(sequences=read, tokens=read * before.data.sequence_length)


def history_tensor(history: BatchHistory) -> torch.Tensor:
    """int64 [segments + 1, 6], as a checkpoint holds it."""
    return torch.tensor(history.rows())


def _check_own(config: RunConfig, accepted: list[str], path: Path, home: Home) -> None:
    """Refuse what may not change after the newest checkpoint that can be read."""
    before = newest_config(path) if (path / "config.yaml").is_file() else None
    check_home(home, before, path)
    for step in reversed(complete_steps(home)):
        try:
            history_of(home, step, before)
        except UserError:  # damaged; newest_intact says so
            continue
        _check_against(config, accepted, path, home, step)
        return


def _check_against(config: RunConfig, accepted: list[str], path: Path, home: Home, step: int) -> BatchHistory:
    """Refuse what may not differ from the run in `path`, whose checkpoint of `step` is gone on from."""
    before = newest_config(path)
    history = history_of(home, step, before)
    seen = batch_plan(before, history).at(step - 1).tokens
    instead = ["set init.keep=optimizer"] if path != run_directory(config) else []
    changed = check_changes(before, config, seen, accepted, whose_run(path, before, step), *instead)
    changed += check_decay(before, config, step, history.tokens, accepted, str(path))
    if changed:
        say(f"resuming with other settings: {', '.join(changed)}")
    return history
