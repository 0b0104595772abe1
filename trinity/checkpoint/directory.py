"""The checkpoints of one run: which are complete, which is the newest intact one, and which are deleted.

RUN_DIR/checkpoints/, or the folder that checkpoint.url names
    step_00000100/      one checkpoint (checkpoint.py)
    latest              the name of the newest one, a hint for people: no code reads it

A checkpoint is complete if COMPLETE exists and every file has the size listed there, intact if the checksums agree too,
and damaged if it has a COMPLETE that its files contradict.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trinity.checkpoint.checkpoint import COMPLETE, METADATA, Checkpoint
from trinity.config.run import AverageConfig
from trinity.errors import UserError
from trinity.io.remote_path import AnyPath, any_path
from trinity.parallel.collectives import run_on_rank0
from trinity.run_directory import newest_config
from trinity.terminal import say

Note = Callable[..., None]
"""note(kind, message, **figures): report an event to people and to events.jsonl."""


def warn(kind: str, message: str, **figures: Any) -> None:
    """The default Note: one line on stderr."""
    say(f"warning: {message}")


@dataclass(frozen=True)
class CheckpointDirectory:
    """The folder that holds the step_… folders of one run.

    folder: a local folder or a URL.
    label: what messages call it: the run directory, or the folder that checkpoint.url names.
    """

    folder: AnyPath
    label: str

    @classmethod
    def at(cls, run_directory: Path, url: str | None = None) -> "CheckpointDirectory":
        """The checkpoints of a run, given its directory and its checkpoint.url.

        Raises:
            UserError: an unknown protocol, or one whose package is not installed.
        """
        if not url:
            return cls(run_directory / "checkpoints", str(run_directory))
        folder = any_path(url)
        return cls(folder, str(folder))

    @classmethod
    def of_run(cls, run_directory: Path) -> "CheckpointDirectory":
        """The checkpoints of an existing run; checkpoint.url is taken from the config of its last start.

        Raises:
            UserError: not a run directory, or a URL whose protocol is unknown or lacks its package.
        """
        return cls.at(run_directory, newest_config(run_directory).checkpoint.url)

    def __str__(self) -> str:
        return self.label

    def path_of(self, step: int) -> AnyPath:
        """The folder of the checkpoint after `step` steps."""
        return self.folder / f"step_{step:08d}"

    def checkpoint(self, step: int) -> Checkpoint:
        """The checkpoint after `step` steps, which may not exist."""
        return Checkpoint(self.path_of(step))

    def complete_steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending; checksums are not compared."""
        return [step for step in self._steps() if self.checkpoint(step).is_complete()]

    def _steps(self) -> list[int]:
        """Steps of all checkpoint folders, ascending. Names in another format (step_7) are ignored."""
        names = {path.name for path in self.folder.glob("step_*")}
        steps = sorted({int(name[5:]) for name in names if name[5:].isdecimal()})
        return [step for step in steps if self.path_of(step).name in names]

    def newest_intact(self, note: Note = warn, before: int | None = None) -> int:
        """Step of the newest checkpoint whose files all agree with its COMPLETE; every rank calls this.

        Args:
            note: called on rank 0 for each damaged or incomplete checkpoint that is skipped.
            before: consider only checkpoints of earlier steps than this one.
        Returns:
            The step; 0 where no checkpoint was ever completed.
        Raises:
            UserError: every complete checkpoint is damaged.
        """
        damaged = []
        for step, has_complete in run_on_rank0(self._candidates, before):
            checkpoint = self.checkpoint(step)
            reason = checkpoint.why_damaged()
            if not reason:
                return step
            if has_complete:
                damaged.append(f"{checkpoint.path.name} ({reason})")
                _note_on_rank0(note, step, f"the checkpoint {checkpoint.path} is damaged ({reason}) and is not used")
            else:
                message = "has no COMPLETE, as a save that was cut off leaves it, and is not used"
                _note_on_rank0(note, step, f"the checkpoint {checkpoint.path} {message}")
        if damaged:
            raise UserError(
                f"every checkpoint in {self} is damaged: {', '.join(damaged)}; put one back from a copy, "
                "or start a new run with another run.dir"
            )
        return 0

    def _candidates(self, before: int | None) -> list[tuple[int, bool]]:
        """(step, whether a COMPLETE exists, readable or not) of each checkpoint folder, newest first."""
        steps = [step for step in reversed(self._steps()) if before is None or step < before]
        return [(step, (self.path_of(step) / COMPLETE).exists()) for step in steps]

    def pick_intact(self, step: int | None, note: Note = warn) -> int:
        """Return the requested step, or for None the newest intact one; every rank calls this.

        Args:
            step: the requested step.
            note: called on rank 0 for each damaged or incomplete checkpoint that is skipped.
        Raises:
            UserError: there is no complete checkpoint, or the requested one is missing or damaged.
        """
        if step is None:
            newest = self.newest_intact(note)
            return newest or run_on_rank0(self.pick_complete, None)  # which raises: there is none
        run_on_rank0(self.pick_complete, step)
        reason = self.checkpoint(step).why_damaged()
        if reason:
            others = [other for other in run_on_rank0(self.complete_steps) if other != step]
            raise UserError(f"{self.path_of(step)} is damaged ({reason}); take another of {others}")
        return step

    def pick_complete(self, step: int | None) -> int:
        """Return the requested step, or for None the newest complete one; checksums are not compared.

        Raises:
            UserError: there is no complete checkpoint, or none of the requested step.
        """
        steps = self.complete_steps()
        if not steps:
            raise UserError(f"{self} has no complete checkpoint")
        if step is None:
            return steps[-1]
        if step not in steps:
            raise UserError(f"{self} has no complete checkpoint of step {step}; it has {steps}")
        return step

    def retain(self, step: int, keep: int, keep_every: int, averaged: Collection[int] = ()) -> None:
        """Delete the checkpoints that the retention policy no longer keeps, now that `step` is complete.

        Kept are the newest `keep` complete checkpoints up to `step`, every multiple of `keep_every` (0: none), and
        those of the steps `averaged`. Checkpoints of later steps stay and do not count: a rollback left them, or they
        were found damaged. The remains of interrupted saves and deletions before `step` are deleted too.
        """
        steps = [complete for complete in self.complete_steps() if complete <= step]
        for old in steps[:-keep]:
            if old not in averaged and (not keep_every or old % keep_every):
                self.checkpoint(old).remove()
        for other in self._steps():
            path = self.path_of(other)
            if other < step and not (path / COMPLETE).exists() and not (path / METADATA).exists():
                self.checkpoint(other).remove()


def averaged_steps(average: AverageConfig, step: int) -> list[int]:
    """The steps whose checkpoints a run averages after `step` steps, ascending; fewer than the window at first."""
    if average.every is None:
        return []
    newest = step // average.every
    return [count * average.every for count in range(max(newest - average.window, 0) + 1, newest + 1)]


def _note_on_rank0(note: Note, step: int, message: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        note("checkpoint_damaged", message, step=step)
