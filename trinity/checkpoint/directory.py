"""What makes a folder a checkpoint: COMPLETE, written last, lists every file with its size and checksum.

A folder without COMPLETE is a save or a deletion that was cut off. One whose COMPLETE cannot be read, or whose files
are not as it lists them, is damaged. `latest` is a hint for people; nothing reads it.

`home` says whose checkpoints: a run directory, which has them in checkpoints/, or the Shelf that checkpoint.url names.

The checksum is crc32 (trinity/io/checksum.py). Loading checks before it reads, and rank r of R checks the files r,
r + R, …: as much as it wrote itself, however many ranks there are.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from trinity.config.run import RunConfig
from trinity.errors import Failure, UserError
from trinity.io.checksum import FileSum, sum_of
from trinity.io.json_files import to_json
from trinity.io.local import sync_folder, write_atomically
from trinity.io.remote_path import AnyPath, RemotePath, any_path
from trinity.parallel.collectives import run_on_all_ranks, run_on_rank0
from trinity.run_directory import newest_config
from trinity.terminal import say

Note = Callable[..., None]
"""Takes the kind of an event, one sentence, and figures by name: how it reaches people and events.jsonl."""

METADATA = ".metadata"


class Shelf(NamedTuple):
    """A folder of step_… folders that is not in their run's directory."""

    folder: AnyPath

    def __str__(self) -> str:
        return str(self.folder)


Home = Path | Shelf


def home_of(url: str | None, run_directory: Path) -> Home:
    """Whose checkpoints those of a run are, given its checkpoint.url.

    Raises:
        UserError: an unknown protocol, or one whose package is not installed.
    """
    return Shelf(any_path(url)) if url else run_directory


def folder_of(home: Home) -> AnyPath:
    """The folder that holds step_…"""
    return home.folder if isinstance(home, Shelf) else home / "checkpoints"


def step_folder(home: Home, step: int) -> AnyPath:
    """Where the checkpoint after `step` steps lives."""
    return folder_of(home) / f"step_{step:08d}"


def mark_complete(folder: AnyPath, sums: dict[str, FileSum]) -> None:
    """Write COMPLETE, once every file is on the disk, or in the store, under its name."""
    _sync(folder)
    _sync(folder.parent)
    files = {name: found._asdict() for name, found in sorted(sums.items())}
    _write(folder / "COMPLETE", to_json({"files": files}, indent=1) + "\n")  # lasts before anything older goes
    _write(folder.parent / "latest", folder.name + "\n")


def _write(path: AnyPath, text: str) -> None:
    if isinstance(path, RemotePath):
        path.write_bytes(text.encode())
    else:
        write_atomically(path, text)


def _sync(folder: AnyPath) -> None:
    if not isinstance(folder, RemotePath):
        sync_folder(folder)


def remove(folder: AnyPath) -> None:
    """Delete a checkpoint, or what is left of one, so that a deletion that is cut off leaves nothing that looks whole.

    COMPLETE goes first; without .metadata the rest cannot be read, and `retain` knows it for rubbish.
    """
    for name in ("COMPLETE", METADATA):
        (folder / name).unlink(missing_ok=True)
    if isinstance(folder, RemotePath):
        folder.rmtree()
    else:
        shutil.rmtree(folder)


def retain(home: Home, step: int, keep: int, keep_every: int) -> None:
    """Remove what the complete checkpoint of `step` makes superfluous.

    Kept are the newest `keep` complete ones up to that step and every `keep_every`-th step (0: none). Later ones, which
    a run that went back has left or found damaged, count for nothing and stay. Leftovers of saves and deletions that
    were cut off go as well.
    """
    steps = [done for done in complete_steps(home) if done <= step]
    for old in steps[:-keep]:
        if not keep_every or old % keep_every:
            remove(step_folder(home, old))
    for other in _steps(home):
        folder = step_folder(home, other)
        if other < step and not (folder / "COMPLETE").exists() and not (folder / METADATA).exists():
            remove(folder)


def complete_steps(home: Home) -> list[int]:
    """Steps of the complete checkpoints, ascending; their checksums are not looked at."""
    return [step for step in _steps(home) if is_complete(step_folder(home, step))]


def _steps(home: Home) -> list[int]:
    names = {path.name for path in folder_of(home).glob("step_*")}
    steps = sorted({int(name[5:]) for name in names if name[5:].isdecimal()})
    return [step for step in steps if step_folder(home, step).name in names]  # step_7 is none of ours


def is_complete(folder: AnyPath) -> bool:
    """Whether COMPLETE is there and every file that it lists has its size."""
    sums = _listed(folder)
    return sums is not None and not _wrong_size(folder, sums)


def size_of(folder: AnyPath) -> int:
    """Bytes of a checkpoint as COMPLETE lists them, 0 without it."""
    return sum(known.bytes for known in (_listed(folder) or {}).values())


def _listed(folder: AnyPath) -> dict[str, FileSum] | None:
    try:
        files = json.loads((folder / "COMPLETE").read_bytes())["files"]
        sums = {name: FileSum(int(known["bytes"]), str(known["crc32"])) for name, known in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return sums if METADATA in sums else None


def _wrong_size(folder: AnyPath, sums: dict[str, FileSum]) -> str:
    """What is wrong with the first file that has not its size, "" for nothing."""
    sizes = folder.sizes() if isinstance(folder, RemotePath) else None  # a request for each would take minutes
    for name, known in sums.items():
        try:
            size = (folder / name).stat().st_size if sizes is None else sizes[name]
        except (FileNotFoundError, KeyError):
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if size != known.bytes:
            return f"{name} has {size} bytes of {known.bytes}"
    return ""


def check_sizes(folder: AnyPath, sums: dict[str, FileSum]) -> None:
    """Whether all that was written is there, before COMPLETE says so.

    Raises:
        Failure: some of it is not.
    """
    wrong = _wrong_size(folder, sums)
    if wrong:
        raise Failure(f"{folder} was written and is not there as it was ({wrong}); run the same command again")


def why_damaged(folder: AnyPath) -> str:
    """What is wrong with a complete checkpoint, "" for nothing; every rank calls this, and all get the same answer."""
    sums, wrong = run_on_rank0(lambda: _check_list(folder))
    if wrong:
        return wrong
    share = list(sums)
    if dist.is_initialized():
        share = share[dist.get_rank() :: dist.get_world_size()]
    found = (_wrong_content(folder / name, sums[name]) for name in share)
    wrong = run_on_all_ranks(lambda: next(filter(None, found), ""))
    answers = [wrong]
    if dist.is_initialized():
        answers = [""] * dist.get_world_size()
        dist.all_gather_object(answers, wrong)
    return next(filter(None, answers), "")


def _check_list(folder: AnyPath) -> tuple[dict[str, FileSum], str]:
    sums = _listed(folder)
    if sums is None:
        return {}, "its COMPLETE is missing or cannot be read"
    return sums, _wrong_size(folder, sums)


def _wrong_content(path: AnyPath, known: FileSum) -> str:
    try:
        return "" if sum_of(path) == known else f"{path.name} has changed since it was written"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"


def warn(kind: str, message: str, **more: Any) -> None:
    """The plain Note: one line on stderr."""
    say(f"warning: {message}")


def newest_intact(home: Home, note: Note = warn, before: int | None = None) -> int:
    """The newest checkpoint whose every file is as it was written; every rank calls this.

    Args:
        home: whose.
        note: told, on the first rank alone, of each one that is passed over.
        before: only of earlier steps than this one.
    Returns:
        its step; 0 where no checkpoint was ever completed.
    Raises:
        UserError: there are complete ones and all are damaged.
    """
    damaged = []
    for step, finished in run_on_rank0(lambda: _candidates(home, before)):
        folder = step_folder(home, step)
        wrong = why_damaged(folder)
        if not wrong:
            return step
        if finished:
            damaged.append(f"{folder.name} ({wrong})")
            _tell(note, step, f"the checkpoint {folder} is damaged ({wrong}) and is not used")
        else:
            left = "as a save that was cut off leaves it"
            _tell(note, step, f"the checkpoint {folder} has no COMPLETE, {left}, and is not used")
    if damaged:
        raise UserError(
            f"every checkpoint in {home} is damaged: {', '.join(damaged)}; put one back from a copy, "
            "or start afresh with another run.dir"
        )
    return 0


def _candidates(home: Home, before: int | None) -> list[tuple[int, bool]]:
    """Steps from the newest on, and whether each has a COMPLETE, readable or not."""
    steps = [step for step in reversed(_steps(home)) if before is None or step < before]
    return [(step, (step_folder(home, step) / "COMPLETE").exists()) for step in steps]


def _tell(note: Note, step: int, message: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        note("checkpoint_damaged", message, step=step)


def pick_step(home: Home, step: int | None) -> int:
    """The asked-for or newest complete checkpoint; its checksums are not looked at.

    Raises:
        UserError: there is none, or not that one.
    """
    steps = complete_steps(home)
    if not steps:
        raise UserError(f"{home} has no complete checkpoint")
    if step is None:
        return steps[-1]
    if step not in steps:
        raise UserError(f"{home} has no complete checkpoint of step {step}; it has {steps}")
    return step


def pick_intact(home: Home, step: int | None, note: Note = warn) -> int:
    """The asked-for checkpoint, or the newest that is not damaged; every rank calls this.

    Raises:
        UserError: there is none, or the one asked for is not there or damaged.
    """
    if step is None:
        found = newest_intact(home, note)
        return found or run_on_rank0(lambda: pick_step(home, None))
    run_on_rank0(lambda: pick_step(home, step))
    wrong = why_damaged(step_folder(home, step))
    if wrong:
        others = [other for other in run_on_rank0(lambda: complete_steps(home)) if other != step]
        raise UserError(f"{step_folder(home, step)} is damaged ({wrong}); take another of {others}")
    return step


def home_of_run(run_directory: Path) -> Home:
    """Whose checkpoints those of a run are, by the config of its last start.

    Raises:
        UserError: not a run directory, or a URL that nothing here can open.
    """
    return home_of(newest_config(run_directory).checkpoint.url, run_directory)


def check_home(home: Home, before: RunConfig | None, run_directory: Path) -> None:
    """Refuse to begin anew, or to go back, because checkpoint.url is another one, and to go on with another run's.

    Args:
        home: where the checkpoints of this start are and will be.
        before: config of the run's last start; None where the run directory has none.
    Raises:
        UserError: naming the places.
    """
    done = complete_steps(home)
    if before is None:
        if done:
            raise UserError(
                f"{folder_of(home)} holds checkpoints, and {run_directory} has no config.yaml that says of which run; "
                "put that file back, or give another run.dir or checkpoint.url"
            )
        return
    left = home_of(before.checkpoint.url, run_directory)
    if folder_of(left) == folder_of(home):
        return
    here, there = max(done, default=0), max(complete_steps(left), default=0)
    if here < there:
        raise UserError(
            f"the checkpoints of {run_directory} are in {folder_of(left)} up to step {there}, and in "
            f"{folder_of(home)} up to step {here}; copy them there or give the old checkpoint.url back"
        )
