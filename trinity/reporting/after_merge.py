"""Merge, recalibrate the result, and write its page: what tools/merge.py does with --recalibrate and --report.

Everything is checked before the merge. With a recalibration, the folder gets its name when that is done: it is merged
under a temporary name, .NAME.merged, so that after a kill the same command gives the same bytes. At most one whole
model is in memory, and only to evaluate it.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from trinity.config.hf_config import from_hf_config
from trinity.config.run import BalancingConfig
from trinity.data.tokenizer.tokenizer import fingerprint
from trinity.errors import UserError
from trinity.evaluation.expert_load import moe_layers
from trinity.interop.output_folder import SHARD_BYTES, check_replaceable, replace_folder
from trinity.interop.weight_map import weight_map
from trinity.io.json_files import read_json, write_json
from trinity.io.local import make_folder, write_atomically
from trinity.merging.balance import ROWS, Rows, Rule, read_rows, settle_biases
from trinity.merging.experts import unrelated_models
from trinity.merging.fit_routers import Fitted, fit_routers, router_logits
from trinity.merging.folder_files import RECIPE, merged_config
from trinity.merging.load_model import load_model
from trinity.merging.merge_models import Merger
from trinity.merging.plan import Plan, make_plan
from trinity.merging.recipe import Recipe
from trinity.merging.rewrite import copy_folder, rewrite_tensors
from trinity.merging.sources import FolderSource, Source
from trinity.merging.statistics import MERGED, compare
from trinity.merging.validation import Figures, RowSettings, ValidationSets, measure
from trinity.models.trinity import Trinity
from trinity.reporting.page import check_out, plotly_script
from trinity.run_directory import newest_config
from trinity.terminal import say

RECALIBRATION = "recalibration.json"
"""In the merged folder: the texts, and the figures before and after."""
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
    directory = directory.resolve()
    if merged:
        _check_merged(directory, recipe, bool(after.recalibrate))
    else:
        check_replaceable(directory, overwrite)
    if merged and not (after.report or after.recalibrate):
        raise UserError("--no-merge leaves nothing to do; give --report or --recalibrate, too")
    plan = make_plan(recipe)
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
    return [f"validation and recalibration hold one whole model at a time: {most * 4 / 1e9:.2f} GB in fp32"]


class _Job:
    """The steps after the merge, and their results for the page."""

    def __init__(self, plan: Plan, directory: Path, after: AfterMerge, progress: bool) -> None:
        self._plan, self._directory, self._after, self._progress = plan, directory, after, progress
        self._validation = ValidationSets(after.validation)
        self._texts = _texts(after.recalibrate, plan)
        self._recalibration = ValidationSets({text: text for text in self._texts}, "--recalibrate")
        self._settings = replace(after.rows, rows=after.rows.rows or ROWS)
        self._before: dict[str, Figures] = {}

    def check(self) -> None:
        """Refuse what cannot be done.

        Raises:
            UserError: naming it.
        """
        plan, after = self._plan, self._after
        if after.report is not None:
            check_out(after.report, "--report")
            plotly_script()
        elif after.validation:
            raise UserError("--validation is for the report; give --report FILE.html, too")
        if after.validation or after.recalibrate:
            from_hf_config(merged_config(plan))  # refuses slices that make a model which Trinity does not compute
        if after.recalibrate and all(plan.dense):
            raise UserError(f"{plan.donor.label} has no MoE layers, so no biases to recalibrate; omit --recalibrate")
        if after.routers:
            self._check_routers()
        for sets in (self._validation, self._recalibration):
            if sets.paths:
                sets.check(plan)

    def _check_routers(self) -> None:
        plan = self._plan
        if not self._texts:
            raise UserError("--recalibrate-routers needs texts; give --recalibrate MODEL=TEXT for each model")
        for text, label in self._texts.items():
            if label is None:
                raise UserError(
                    f"--recalibrate-routers needs to know whose routing {text} shall have; write --recalibrate "
                    f"MODEL={text} with one of {', '.join(plan.sources)}"
                )
            own = plan.sources[label].tokenizer or plan.vocabulary.donor.tokenizer
            donor = plan.vocabulary.donor.tokenizer
            if plan.vocabulary.tokenizer_json is not None or (donor and own and fingerprint(own) != fingerprint(donor)):
                raise UserError(f"--recalibrate-routers needs one tokenizer, and that of {label} is another; omit it")
        if plan.recipe.has_layers or plan.recipe.match_experts:
            raise UserError(
                "--recalibrate-routers needs models whose layers and experts are those of the merged one, and the "
                "recipe has slices or match_experts; omit it"
            )

    def recalibrate(self, folder: Path) -> list[str]:
        """Recalibrate biases, and routers if wanted, in a folder that has not its name yet; returns lines."""
        after, source = self._after, FolderSource(str(folder), folder)
        model = load_model(source).to(after.rows.device)
        if after.validation:
            self._before = self._measure(self._validation, model, source, after.rows)
        texts = {text: self._rows(text, source, model) for text in self._texts}
        batches = [rows for each in texts.values() for rows in each]
        before = self._measure(self._recalibration, model, source, self._settings)
        config = _balancing(self._plan, after.rule)
        settled = settle_biases(model, batches, config, self._progress)
        passes, fitted = settled.passes, None
        if after.routers:
            # routers first see what the balanced model computes; then the biases follow the new routers
            fitted = self._fit(model, texts)
            passes += settle_biases(model, batches, config, self._progress).passes
        figures = self._measure(self._recalibration, model, source, self._settings)
        tensors = _routing_tensors(model, after.routers)
        count = rewrite_tensors(folder, tensors)
        record = {
            "texts": self._texts,
            "rule": config.kind,
            "passes": passes,
            "before": {text: each.metrics for text, each in before.items()},
            "after": {text: each.metrics for text, each in figures.items()},
            "routers": None if fitted is None else fitted._asdict(),
        }
        write_json(folder / RECALIBRATION, record)
        biases = len(moe_layers(model))
        return [
            f"recalibrated by {config.kind} in {passes} passes: {count} tensors rewritten, {biases} expert biases and "
            f"{count - biases} routers; all others as merged",
            *(f"{title}: {a} before, {b} after" for title, (a, b) in _figures_before_and_after(record).items()),
        ]

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
            recalibrated={} if record is None else _figures_before_and_after(record),
            notes=list(self._plan.notes),
        )
        if self._after.validation:
            for label, each in self._plan.sources.items():
                results.figures[label], notes = self._evaluate(each)
                results.notes += [f"{label} is not evaluated on one text: {note}" for note in notes]
            if self._before:
                results.figures[BEFORE] = self._before
            results.figures[MERGED] = self._evaluate(source)[0]
        make_folder(self._after.report.resolve().parent)
        write_atomically(self._after.report, merge_page(results))

    def _evaluate(self, source: Source) -> tuple[dict[str, Figures], list[str]]:
        model = load_model(source).to(self._after.rows.device)
        return self._validation.measure(model, source, self._plan.vocabulary.donor.tokenizer, self._after.rows)

    def _measure(
        self, sets: ValidationSets, model: Trinity, source: Source, settings: RowSettings
    ) -> dict[str, Figures]:
        """Figures of the merged model; every text is one that it can read."""
        assert source.tokenizer is not None
        return {
            name: measure(
                model, sets.documents(name, source.tokenizer, model.config.vocab_size), source.tokenizer, settings
            )
            for name in sets.paths
        }

    def _rows(self, text: str, source: Source, model: Trinity) -> list[Rows]:
        assert source.tokenizer is not None
        documents = self._recalibration.documents(text, source.tokenizer, model.config.vocab_size)
        settings = self._settings
        assert settings.rows is not None
        return read_rows(documents, settings.row_tokens(model), settings.rows, settings.batch_tokens, settings.device)

    def _fit(self, model: Trinity, texts: dict[str, list[Rows]]) -> Fitted:
        """Fit the routers; the merged model waits on the CPU while another one computes."""
        device = self._after.rows.device
        model.to("cpu")
        logits = []
        for text, batches in texts.items():
            label = self._texts[text]
            assert label is not None
            logits.append(router_logits(load_model(self._plan.sources[label]).to(device), batches))
        model.to(device)
        batches = [rows for each in texts.values() for rows in each]
        return fit_routers(model, batches, [torch.cat(parts) for parts in zip(*logits)], self._progress)


def _figures_before_and_after(record: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Title → values before and after, of the content of recalibration.json."""
    titles = {"loss": "loss", "max_violation_mean": "MaxVio, mean of the layers",
              "max_violation": "MaxVio, worst layer", "dead_experts": "dead experts"}  # fmt: skip
    pairs = {
        f"{text}: {title}": (record["before"][text][key], record["after"][text][key])
        for text in record["texts"]
        for key, title in titles.items()
    }
    if record["routers"] is not None:
        title = "routers: mean squared difference of the scores from the models' own"
        pairs[title] = record["routers"]["before"], record["routers"]["after"]
    return {title: (f"{before:.6g}", f"{after:.6g}") for title, (before, after) in pairs.items()}


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


def _texts(given: Sequence[str], plan: Plan) -> dict[str, str | None]:
    """Text → label of its model, or None, of the --recalibrate arguments.

    Raises:
        UserError: a text is given twice, or for a model that the recipe does not have.
    """
    found: dict[str, str | None] = {}
    for each in given:
        label = next((label for label in plan.sources if each.startswith(f"{label}=")), None)
        text = each if label is None else each.removeprefix(f"{label}=")
        name, equals, _ = text.partition("=")
        if label is None and equals and not Path(text).exists():
            raise UserError(f"--recalibrate {each}: {name} is none of the models; they are {', '.join(plan.sources)}")
        if text in found:
            raise UserError(f"--recalibrate names {text} twice; give each text once")
        found[text] = label
    return found


def _balancing(plan: Plan, rule: Rule | None) -> BalancingConfig:
    """The rule that moves the biases, with the constants of the run that gives the config, if it is a run."""
    config = BalancingConfig() if plan.donor.files is not None else newest_config(plan.donor.folder).balancing
    return replace(config, kind=rule or ("smebu" if config.kind == "none" else config.kind))


def _routing_tensors(model: Trinity, routers: bool) -> dict[str, Any]:
    """Name on disk → value of the expert biases, and of the routers."""
    endings = (".expert_bias", ".router.weight") if routers else (".expert_bias",)
    state = model.state_dict()
    return {name: state[parameter] for name, parameter, _ in weight_map(model.config) if parameter.endswith(endings)}


def _check_merged(directory: Path, recipe: Recipe, replaced: bool) -> None:
    """Refuse a folder that this recipe did not make, or that is to be replaced and holds another folder."""
    try:
        text = (directory / RECIPE).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory} is no merged folder: it has no {RECIPE}; merge without --no-merge") from None
    if text != recipe.text:
        raise UserError(f"{directory} was merged by another recipe; give {directory / RECIPE}, or merge again")
    folders = [path.name for path in sorted(directory.iterdir()) if path.is_dir()]
    if replaced and folders:
        raise UserError(f"{directory} holds the folder {folders[0]}, which is no part of a model; move it elsewhere")
