"""Merge, recalibrate the result, and write its page: what tools/merge.py does with --recalibrate and --report.

Everything is checked before the merge. With a recalibration, the folder gets its name when that is done: it is merged
under a temporary name, .NAME.merged, so that after a kill the same command gives the same bytes. Statistics
stream; to evaluate, one whole model is in memory, and to fit routers two.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from trinity.config.hf_config import from_hf_config
from trinity.errors import UserError
from trinity.interop.output_folder import SHARD_BYTES, check_replaceable, replace_folder
from trinity.io.json_files import read_json
from trinity.io.local import make_folder, resolve_path, write_atomically
from trinity.merging.balance import Rule
from trinity.merging.experts import unrelated_models
from trinity.merging.folder_files import RECIPE, merged_config
from trinity.merging.load_model import load_model
from trinity.merging.merge_models import Merger
from trinity.merging.plan import Plan, make_plan
from trinity.merging.recalibrate import RECALIBRATION, Recalibration, before_and_after
from trinity.merging.recipe import Recipe
from trinity.merging.rewrite import copy_folder
from trinity.merging.sources import FolderSource, Source
from trinity.merging.statistics import MERGED, compare
from trinity.merging.validation import Figures, RowSettings, ValidationSets
from trinity.reporting.page import check_out, plotly_script
from trinity.terminal import say

BEFORE = f"{MERGED}, before recalibration"


@dataclass(frozen=True)
class AfterMerge:
    """What follows a merge.

    report: the HTML page; None: none.
    validation: name → shards or text files on which all models are evaluated, for the page.
    recalibrate: texts to recalibrate on: shards or text files, or MODEL=TEXT with a model of the recipe.
    routers: also fit the routers, each text to its model.
    rule: that moves the biases; None: that of the run that gives the config, else SMEBU.
    rows: of all texts; of those to recalibrate on, by default, ROWS each.
    """

    report: Path | None = None
    validation: dict[str, str] = field(default_factory=dict)
    recalibrate: Sequence[str] = ()
    routers: bool = False
    rule: Rule | None = None
    rows: RowSettings = field(default_factory=RowSettings)


def merge_and_measure(
    recipe: Recipe,
    directory: Path,
    after: AfterMerge,
    *,
    workers: int = 1,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    merged: bool = False,
    progress: bool = False,
) -> list[str]:
    """Merge as a recipe says, then recalibrate and report as `after` says.

    Args:
        recipe, workers, max_shard_bytes, overwrite, progress: see trinity.merging.merge.
        directory: the folder to make; or, with `merged`, one that this recipe made.
        merged: do not merge.
    Returns:
        lines for the user.
    Raises:
        UserError: as trinity.merging.merge, or naming what of `after` cannot be done. Nothing is written then.
    """
    directory = resolve_path(directory)
    if merged:
        check_merged(directory, recipe, bool(after.recalibrate))
    else:
        check_replaceable(directory, overwrite)
    if merged and not (after.report or after.recalibrate):
        raise UserError("--no-merge leaves nothing to do; give --report or --recalibrate, too")
    plan = make_plan(recipe)
    if merged:
        _check_tensors(directory, plan)
    job = _Job(plan, directory, after, progress)
    job.check()
    merger = Merger(plan, directory, workers, max_shard_bytes)
    if progress and not merged:
        for note in plan.notes + unrelated_models(plan):
            say(f"note: {note}")
    lines, account = [], []
    if after.recalibrate:
        stage = directory.with_name(f".{directory.name}.merged")
        if merged:
            stage = copy_folder(directory)
        else:
            account = [str(Merger(plan, stage, workers, max_shard_bytes).run(progress))]
        try:
            lines += job.recalibrate(stage)
        except UserError:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        replace_folder(stage, directory)
    elif not merged:
        account = [str(merger.run(progress))]
    if after.report is not None:
        job.report(merger)
        lines.append(f"the report is in {after.report}")
    return [*lines, *([] if merged else [f"the merged model is in {directory}"]), *account]


def check_after_merge(plan: Plan, directory: Path, after: AfterMerge) -> list[str]:
    """Check what follows a merge, and write nothing.

    Returns:
        remarks for the user.
    Raises:
        UserError: see merge_and_measure.
    """
    _Job(plan, directory, after, False).check()
    if not (after.validation or after.recalibrate):
        return []
    most = max(sum(prod(entry.shape) for entry in source.entries.values()) for source in plan.sources.values())
    number, bytes = ("two", 8) if after.routers else ("one", 4)
    models = f"{number} whole model{'s' * after.routers} at a time"
    return [f"validation and recalibration hold {models}: {most * bytes / 1e9:.2f} GB in fp32"]


class _Job:
    """The steps after the merge, and their results for the page."""

    def __init__(self, plan: Plan, directory: Path, after: AfterMerge, progress: bool) -> None:
        self._plan, self._directory, self._after, self._progress = plan, directory, after, progress
        self._validation = ValidationSets(after.validation)
        self._recalibration = Recalibration(
            plan, after.recalibrate, after.routers, after.rule, after.rows, progress=progress
        )
        self._before: dict[str, Figures] = {}

    def check(self) -> None:
        """Refuse what cannot be done.

        Raises:
            UserError: naming it.
        """
        plan, after = self._plan, self._after
        if after.report is not None:
            check_out(after.report, "--report")
            self._check_place(resolve_path(after.report))
            plotly_script()
        elif after.validation:
            raise UserError("--validation is for the report; give --report FILE.html, too")
        if after.report or after.recalibrate:
            from_hf_config(merged_config(plan))  # refuses slices that make a model which Trinity does not compute
        if self._validation.paths:
            self._validation.check(plan)
        self._recalibration.check()

    def _check_place(self, report: Path) -> None:
        """Refuse a report that could not be written after the merge."""
        if report == resolve_path(self._directory):
            raise UserError(f"--report {report} is the folder to make; name another file")
        parent = next(folder for folder in report.parents if folder.exists())
        if not parent.is_dir():
            raise UserError(f"--report {report} is in {parent}, which is a file; name another place")

    def recalibrate(self, folder: Path) -> list[str]:
        """Recalibrate a folder that has not its name yet; returns lines for the user."""
        if self._after.validation:
            self._before = self._evaluate(FolderSource(str(folder), folder))[0]
        return self._recalibration.run(folder)

    def report(self, merger: Merger) -> None:
        """Write the page; the folder has its name."""
        from trinity.reporting.merge_report import MergeResults, merge_page  # imports plotly, which may be missing

        assert self._after.report is not None
        source = FolderSource(str(self._directory), self._directory)
        record = read_json(self._directory / RECALIBRATION, "merge again")
        results = MergeResults(
            self._plan,
            str(self._directory),
            compare(self._plan, merger.reader, source, self._progress),
            recalibrated={} if record is None else before_and_after(record),
            notes=list(self._plan.notes),
        )
        if self._after.validation:
            for label, each in self._plan.sources.items():
                results.figures[label], notes = self._evaluate(each)
                results.notes += [f"{label} is not evaluated on one text: {note}" for note in notes]
            if self._before:
                results.figures[BEFORE] = self._before
            results.figures[MERGED] = self._evaluate(source)[0]
        make_folder(resolve_path(self._after.report).parent)
        write_atomically(self._after.report, merge_page(results))

    def _evaluate(self, source: Source) -> tuple[dict[str, Figures], list[str]]:
        model = load_model(source).to(self._after.rows.device)
        return self._validation.measure(model, source, self._plan.vocabulary.donor.tokenizer, self._after.rows)


def named_texts(option: str, given: Sequence[str]) -> dict[str, str]:
    """NAME=TEXT as name → text.

    Raises:
        UserError: one has another form, or a name is given twice.
    """
    found: dict[str, str] = {}
    for each in given:
        name, equals, text = each.partition("=")
        if not (name and equals and text):
            raise UserError(f"{option} {each} is not understood; write {option} NAME=TEXT, such as code=data/code")
        if name in found:
            raise UserError(f"{option} names {name} twice; give each text a name of its own")
        found[name] = text
    return found


def check_merged(directory: Path, recipe: Recipe, replaced: bool) -> None:
    """Refuse a folder that this recipe did not make, or that is to be replaced and holds another folder."""
    try:
        text = (directory / RECIPE).read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory} is no merged folder: it has no {RECIPE}; merge without --no-merge") from None
    if text != recipe.text:
        raise UserError(f"{directory} was merged by another recipe; give {directory / RECIPE}, or merge again")
    folders = [path.name for path in sorted(directory.iterdir()) if path.is_dir()]
    if replaced and folders:
        raise UserError(f"{directory} holds the folder {folders[0]}, which is no part of a model; move it elsewhere")


def _check_tensors(directory: Path, plan: Plan) -> None:
    """Refuse a merged folder that has not the tensors of the plan: one of them was changed since."""
    entries = FolderSource(str(directory), directory).entries
    for job in plan.jobs:
        if job.name not in entries or entries[job.name].shape != job.shape:
            raise UserError(f"{directory} has no {job.name} of shape {job.shape}; it, or a model, changed; merge again")
