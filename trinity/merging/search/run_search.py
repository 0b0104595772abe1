"""Search the parameters of a merge: merge in memory, evaluate, ask the optimizer for the next trial.

The folder of a search:

    search.yaml          the search file
    search.json          what a continued search must agree with: models and texts, by sizes and times
    trials.jsonl         one line for each model of the recipe and for each trial, appended when it is done
    history.json         all of it in one object, with the best trial and the Pareto front
    best_recipe.yaml     the recipe of the best trial, which tools/merge.py repeats
    front/trial_N.yaml   with several objectives: the recipes of the Pareto front
    model/               the best merge

Trial 0 is the recipe's start, then come try_first, then the optimizer's. Values that were tried before are no new
trial: the optimizer is told their cost again. A search that was interrupted, by kill -9 too, goes on when the same
command is given again: the optimizer is told the logged costs, and asks for the same trials as an undisturbed search.
A larger budget continues a finished one.
"""

import glob
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from trinity.errors import UserError
from trinity.io.json_files import append_json_line, read_json, to_json, write_json
from trinity.io.local import file_lock, make_folder, resolve_path, write_atomically
from trinity.merging.experts import unrelated_models
from trinity.merging.load_model import load_model
from trinity.merging.memory_merge import MemoryMerge
from trinity.merging.merge_models import Merger
from trinity.merging.plan import Job
from trinity.merging.recipe import read_recipe
from trinity.merging.search.log import Log, Trial, read_log
from trinity.merging.search.objectives import Objectives, front
from trinity.merging.search.optimizers import CmaEs, LineSearch, Optimizer
from trinity.merging.search.result import TRIAL_MODEL, Found, write_results
from trinity.merging.search.search_file import SearchFile
from trinity.merging.search.space import SearchSpace
from trinity.merging.tensor_merger import InfiniteResult
from trinity.terminal import Progress, say

SEARCH, IDENTITY, TRIALS = "search.yaml", "search.json", "trials.jsonl"


class Search:
    """A search, checked; `run` carries it out.

    Args:
        search: the file.
        folder: of the search; made by `run`.
        device: of the merged model.
        workers: threads that merge.
    Raises:
        UserError: whatever is wrong with file, models, texts or folder. Nothing is written.
    """

    def __init__(self, search: SearchFile, folder: Path, *, device: str = "cpu", workers: int = 1) -> None:
        if workers < 1:
            raise UserError(f"--workers {workers} must be at least 1")
        self.file, self.folder = search, resolve_path(folder)
        self.space = SearchSpace(search)
        self.plan = self.space.plan
        self.objectives = Objectives(search, self.plan, device)
        self._device, self._workers = device, workers
        self._optimizer = self._make_optimizer()
        self._identity = self._make_identity()
        self._check_folder()

    def summary(self) -> str:
        """What the search will do, for people."""
        variables = (f"  {v.name}: {v.low:g} to {v.high:g}, from {v.start:g}" for v in self.space.variables)
        limits = {"trials": self.file.trials, "minutes": self.file.minutes}
        budget = [f"{limit:g} {unit}" for unit, limit in limits.items() if limit is not None]
        kind = "a line search" if isinstance(self._optimizer, LineSearch) else "CMA-ES"
        size = sum(job.bytes // job.dtype.itemsize for job in self.plan.jobs)
        return "\n".join([
            f"models:     {', '.join(self.plan.sources)}",
            f"objectives: {', '.join(f'{o.weight:g} x {o.name} ({o.metric})' for o in self.objectives.each)}",
            f"budget:     {' or '.join(budget)}, by {kind}",
            f"memory:     one model in fp32, {size * 4 / 1e9:.2f} GB, and the checkpoints of runs",
            f"variables:  {len(self.space.variables)}",
            *variables,
        ])  # fmt: skip

    def run(self, progress: bool = False) -> Found:
        """Search, then write history, recipes and model; returns what was found.

        Raises:
            UserError: the models changed, or the log is of another search.
        """
        make_folder(self.folder)
        try:
            with file_lock(self.folder, patience=0):
                self._begin()
                found = self._search(progress)
                write_results(self.folder, found, self.space.recipe_content, self._workers, progress)
                return found
        except BlockingIOError:
            raise UserError(f"another search is writing {self.folder}; wait for it, or give another folder") from None

    def _make_optimizer(self) -> Optimizer:
        variables = self.space.variables
        if len(variables) == 1:
            return LineSearch()
        start = [variable.share_of(variable.start) for variable in variables]
        return CmaEs(start, self.file.step, self.file.seed, self.file.population)

    def _make_identity(self) -> dict[str, Any]:
        texts = {each.name: _files(each.text) for each in self.file.objectives if each.text is not None}
        models = {label: source.opened for label, source in self.plan.sources.items()}
        return json.loads(to_json({"search": self.file.lasting, "models": models, "texts": texts}))

    def _check_folder(self) -> None:
        """Refuse a folder that holds something else, or a search that this one does not continue."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file; give the name of a folder to make")
        there = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        known = read_json(self.folder / IDENTITY, "give another folder") if IDENTITY in there else None
        if known is None:
            if not there <= {SEARCH, f"{SEARCH}.tmp", f"{IDENTITY}.tmp"}:
                raise UserError(f"{self.folder} exists and holds no search; give the name of a folder to make")
            return
        for key, words in (("search", "search file"), ("models", "models"), ("texts", "texts")):
            if known.get(key) != self._identity[key]:
                raise UserError(
                    f"{self.folder} holds a search with another {words}; give another folder, or remove this one"
                    if key == "search"
                    else f"the {words} changed since the search in {self.folder} began; give another folder"
                )

    def _begin(self) -> None:
        write_atomically(self.folder / SEARCH, self.file.text)
        write_json(self.folder / IDENTITY, self._identity)

    def _search(self, progress: bool) -> Found:
        log = read_log(self.folder / TRIALS)
        self._measure_models(log, progress)
        logged, stopped, memory = log.trials, "the budget is spent", None
        trials: list[Trial] = []
        costs_of: dict[tuple[float, ...], float] = {}
        with Progress("searching", self.file.trials, "trial", progress) as bar:
            bar.skip_to(len(logged))
            for values, costs in self._asked():
                if self._is_spent(trials):
                    break
                next_logged = logged[len(trials)] if len(trials) < len(logged) else None
                tried = tuple(values) in costs_of
                if tried and not (next_logged and next_logged.values == values):  # earlier versions logged it twice
                    costs.append(costs_of[tuple(values)])
                    continue
                if next_logged:
                    trial = self._checked(next_logged, values)
                else:
                    memory = memory or MemoryMerge(self.plan, self._device, self._workers)
                    trial = self._try(len(trials), values, memory)
                    append_json_line(self.folder / TRIALS, trial.record())
                    bar.update()
                trials.append(trial)
                costs.append(trial.cost)
                costs_of[tuple(values)] = trial.cost
                best = min(trials, key=lambda each: each.cost)
                bar.describe(f"best {best.cost:.5g} (trial {best.number})")
            else:
                stopped = self._optimizer.reason()
        new = max(0, len(trials) - len(logged))
        return self._found(trials + logged[len(trials) :], log.models, stopped, new)

    def _found(self, trials: list[Trial], models: dict[str, dict[str, float]], stopped: str, new: int) -> Found:
        best = min(trials, key=lambda each: each.cost)
        if math.isinf(best.cost):
            raise UserError(
                f"no trial gave a finite model ({best.error or 'its loss is not finite'}); change the bounds"
            )
        on_front = self._front(trials)
        return Found(self.space.variables, self.objectives.each, models, trials, best, on_front, stopped, new)

    def _checked(self, trial: Trial, values: list[float]) -> Trial:
        if trial.values != values:
            raise UserError(
                f"trial {trial.number} in {self.folder / TRIALS} has other values than this search asks for: another "
                "version of cma made it, or the file was changed; give another folder"
            )
        return trial

    def _asked(self) -> Iterator[tuple[list[float], list[float]]]:
        """(values of the next trial, list to append its cost to), until the optimizer has no more."""
        variables = self.space.variables
        yield self.space.start, []
        for value in self.file.try_first:
            yield [variable.value_at(variable.share_of(value)) for variable in variables], []
        while points := self._optimizer.ask():
            costs: list[float] = []
            for point in points:
                yield [variable.value_at(share) for variable, share in zip(variables, point, strict=True)], costs
            self._optimizer.tell(points, costs)

    def _is_spent(self, trials: list[Trial]) -> bool:
        minutes = self.file.minutes
        if self.file.trials is not None and len(trials) >= self.file.trials:
            return True
        return minutes is not None and bool(trials) and sum(each.seconds for each in trials) >= 60 * minutes

    def _try(self, at: int, values: list[float], memory: MemoryMerge) -> Trial:
        started = time.monotonic()
        try:
            jobs = self.space.jobs(values)
        except UserError as error:  # each value is in bounds, all together are not: weights that sum to 0
            return Trial(at, values, {}, {}, math.inf, time.monotonic() - started, str(error))
        try:
            memory.merge(jobs)
        except InfiniteResult as error:
            return Trial(at, values, {}, {}, math.inf, time.monotonic() - started, str(error))
        figures = self.objectives.measure(memory.model, lambda: self._written(values, jobs))
        objectives = self.objectives.values(figures)
        return Trial(at, values, objectives, figures, self.objectives.cost(objectives), time.monotonic() - started)

    def _written(self, values: list[float], jobs: list[Job]) -> Path:
        """The trial as a folder, for lm-eval alone."""
        plan = replace(self.plan, recipe=read_recipe(self.space.recipe_content(values)), jobs=jobs)
        folder = self.folder / TRIAL_MODEL
        Merger(plan, folder, self._workers).run()
        return folder

    def _measure_models(self, log: Log, progress: bool) -> None:
        """Evaluate the models of the recipe that are not in the log yet."""
        missing = [label for label in self.plan.sources if label not in log.models]
        if progress and not log.models:
            for note in self.plan.notes + unrelated_models(self.plan):
                say(f"note: {note}")
        for label in Progress("evaluating the models", len(missing), "model", progress).over(missing):
            source = self.plan.sources[label]
            figures = self.objectives.measure_source(source, load_model(source).to(self._device))
            log.models[label] = self.objectives.values(figures)
            append_json_line(self.folder / TRIALS, {"model": label, "objectives": log.models[label]})

    def _front(self, trials: list[Trial]) -> list[Trial]:
        counted = self.objectives.counted()
        costs = (
            tuple(each.cost(trial.objectives.get(each.name, math.inf)) for each in counted)
            if trial.objectives
            else (math.inf,) * len(counted)
            for trial in trials
        )
        return [trials[at] for at in front(costs)]


def _files(text: str) -> list[list[Any]]:
    """Name, size and time of the files of a text: they change when it does. A URL has none."""
    path = Path(text)
    paths = sorted(path.rglob("*")) if path.is_dir() else [Path(each) for each in sorted(glob.glob(text))]
    return [[str(each), each.stat().st_size, each.stat().st_mtime_ns] for each in paths if each.is_file()]
