"""Merge models into a Hugging Face folder, out of core.

Everything is checked before the first byte is written. The folder is made under a temporary name, .NAME.partial, file
by file, and renamed at the end: nothing half-made looks whole. Files that an interrupted merge of the same recipe and
the same models has finished are kept; the bytes are the same as without an interruption.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trinity.errors import Failure, UserError
from trinity.interop.output_folder import (
    SHARD_BYTES,
    check_replaceable,
    partial_folder,
    replace_folder,
)
from trinity.io.checksum import new_hash
from trinity.io.json_files import read_json, to_json, write_json
from trinity.io.local import file_lock, make_folder, resolve_path
from trinity.merging.experts import unrelated_models
from trinity.merging.folder_files import write_companions
from trinity.merging.inputs import Reader
from trinity.merging.plan import Job, Part, Plan, make_plan
from trinity.merging.recipe import Recipe, read_recipe
from trinity.merging.tensor_merger import TensorMerger, one_thread
from trinity.merging.writer import plan_files, write_file, write_index
from trinity.terminal import Progress, say

VERSION = 1
"""Of the arithmetic: files of an interrupted merge by another version are made anew."""
_MARK = "merge_in_progress.json"


@dataclass(frozen=True)
class Merged:
    """What a merge did: the folder, and the tensors read, written, and dropped (always 0)."""

    folder: Path
    read: int
    written: int
    dropped: int

    def __str__(self) -> str:
        return f"{self.read:,} tensors read, {self.written:,} written, {self.dropped} dropped"


def merge(
    recipe: str | Path | dict[str, Any] | Recipe,
    directory: str | Path,
    *,
    workers: int = 1,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = False,
) -> Merged:
    """Merge models as a recipe says and write a folder that transformers and load_hf read.

    Args:
        recipe: a YAML file, its content as a mapping, or a checked recipe.
        directory: the folder to make.
        workers: threads that merge tensors; the bytes of the result do not depend on it.
        max_shard_bytes: most bytes of tensors in one file; a larger tensor gets a file of its own.
        overwrite: replace an earlier export or merge in `directory`.
        progress: show progress and remarks on stderr.
    Returns:
        the folder, and the count of tensors.
    Raises:
        UserError: the recipe or the models are wrong, the models changed meanwhile, or `directory` may not be replaced.
    """
    checked = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    directory = resolve_path(directory)
    check_replaceable(directory, overwrite)
    plan = make_plan(checked)
    if progress:
        for note in plan.notes + unrelated_models(plan):
            say(f"note: {note}")
    return Merger(plan, directory, workers, max_shard_bytes).run(progress)


class Merger:
    """Carries out a plan.

    Args:
        plan: the checked merge.
        directory: the folder to make.
        workers: number of threads.
        max_shard_bytes: most bytes of one file.
    """

    def __init__(self, plan: Plan, directory: Path, workers: int = 1, max_shard_bytes: int = SHARD_BYTES) -> None:
        if workers < 1 or max_shard_bytes < 1:
            raise UserError(f"workers={workers} and max_shard_bytes={max_shard_bytes} must be at least 1")
        check_apart(plan, directory)
        self._plan, self._directory, self._workers = plan, directory, workers
        self.files = plan_files(plan.jobs, max_shard_bytes)
        self._tensors = TensorMerger(plan)
        self._read: set[Part] = set()

    @property
    def reader(self) -> Callable[[Part, Job], Reader]:
        """reader(part, job): see TensorMerger."""
        return self._tensors.reader

    def run(self, progress: bool = False) -> Merged:
        """Write the folder; returns what was done."""
        partial = partial_folder(self._directory)
        make_folder(partial)
        try:
            with file_lock(partial, patience=0), one_thread():
                self._write(partial, progress)
        except BlockingIOError:
            raise UserError(
                f"another merge is writing {self._directory}; wait for it, or give another folder"
            ) from None
        except UserError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return self._account()

    def _write(self, partial: Path, progress: bool) -> None:
        finished = self._begin(partial)
        self._check_space(partial, finished)
        with Progress("merging", self._plan.bytes_written, "B", progress, scaled=True) as written:

            def done(job: Job) -> None:
                self._read.update(job.parts)
                written.update(job.bytes)

            for file in self.files:
                if file.name in finished:
                    for job in file.jobs:
                        self._read.update(job.parts)
                    written.skip_to(written.n + sum(job.bytes for job in file.jobs))
                    continue
                write_file(file, partial, self._tensors.merge, self._workers, done)
                self._check_unchanged()
        write_index(self.files, partial)
        write_companions(self._plan, partial)
        (partial / _MARK).unlink()
        replace_folder(partial, self._directory)

    def _begin(self, partial: Path) -> set[str]:
        """Keep the finished files of an interrupted merge of the same kind; returns their names."""
        digest = self._digest()
        try:
            same = (read_json(partial / _MARK) or {}).get("digest") == digest
        except UserError:
            same = False
        if same:
            return {file.name for file in self.files if (partial / file.name).is_file()}
        for path in partial.iterdir():
            path.unlink()
        write_json(partial / _MARK, {"digest": digest})
        return set()

    def _digest(self) -> str:
        """Of everything that the files depend on."""
        jobs = [[job.name, job.method, job.arguments, job.base, job.models] for job in self._plan.jobs]
        opened = {label: source.opened for label, source in self._plan.sources.items()}
        headers = [[file.name, file.header.decode("latin-1")] for file in self.files]
        content = to_json([VERSION, torch.__version__, self._plan.recipe.text, opened, jobs, headers])
        digest = new_hash()
        digest.update(content.encode())
        return digest.hexdigest()

    def _check_space(self, partial: Path, finished: set[str]) -> None:
        needed = sum(file.bytes for file in self.files if file.name not in finished)
        free = shutil.disk_usage(partial).free
        if needed > free:
            raise Failure(
                f"{self._directory} needs {needed / 1e9:.1f} GB more and its disk has {free / 1e9:.1f} GB free; free "
                "some space and run the same command again"
            )

    def _check_unchanged(self) -> None:
        for label, source in self._plan.sources.items():
            try:
                same = source.identity() == source.opened
            except FileNotFoundError:
                same = False
            if not same:
                raise UserError(f"{label} changed while it was read; merge again when nothing writes to it")

    def _account(self) -> Merged:
        """Compare the tensors that were read with those that the models have."""
        total = sum(
            len(source.entries)
            for label, source in self._plan.sources.items()
            if any(p.label == label for p in self._read)
        )
        dropped = total - len(self._read) - sum(self._plan.left_out.values())
        assert dropped == 0, f"{dropped} tensors were neither merged nor left out by a slice"
        return Merged(self._directory, len(self._read), len(self._plan.jobs), dropped)


def check_apart(plan: Plan, directory: Path) -> None:
    """Refuse, before the merge, a folder that its end could not replace, or must not."""
    for label, source in plan.sources.items():
        if directory == Path(os.path.realpath(source.folder)):
            raise UserError(
                f"{directory} is a model of this merge ({label}), which it may not replace; give another folder"
            )
    if os.path.ismount(directory):
        raise UserError(f"{directory} is a mount point, which a new folder cannot replace; give a folder in it")
    partial = partial_folder(directory)
    if partial.is_symlink() or partial.is_file():
        raise UserError(f"{partial} is in the way of the merge, which makes a folder of this name; move it away")
