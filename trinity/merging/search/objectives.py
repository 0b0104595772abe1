"""What a search minimises: losses and balance of the merged model on texts, and results of lm-eval's tasks.

Texts are packed into rows once, and computed on the model in memory as `tools/evaluate.py --packed` computes them.
lm-eval runs a folder with transformers: for its tasks alone, the trial is also written, over the one before.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from trinity.errors import UserError
from trinity.merging.plan import Plan
from trinity.merging.search.search_file import Objective, SearchFile
from trinity.merging.sources import FolderSource, Source
from trinity.merging.validation import WINDOW, PackedText, RowSettings, ValidationSets
from trinity.models.trinity import Trinity

Figures = dict[str, dict[str, float]]
"""Name of the objective → metric → value."""
OPTION = "search.objectives:"


class Objectives:
    """The objectives of a search, opened for the merged model's tokenizer.

    Args:
        search: the file.
        plan: of its recipe.
        device: cpu or cuda.
    Raises:
        UserError: a text is missing, empty or of another tokenizer; lm-eval is missing or does not know a task; a
            metric that the model does not have; a row has more tokens than the model positions; or the recipe makes a
            new tokenizer, which is in no folder yet.
    """

    def __init__(self, search: SearchFile, plan: Plan, device: str = "cpu") -> None:
        self.each = search.objectives
        self._plan = plan
        self._texts = [each for each in self.each if each.text is not None]
        self._tasks = [each for each in self.each if each.task is not None]
        settings = RowSettings(**search.evaluation, device=device)
        positions = plan.donor.config.max_positions
        self._window = settings.window or min(WINDOW, positions)
        if self._window > positions:
            raise UserError(
                f"the window of {self._window} tokens is more than the {positions} positions of {plan.donor.label}; "
                f"write window: {positions} or less (--window)"
            )
        self._settings = replace(settings, window=self._window)
        self._packed: dict[tuple[str, Path], PackedText] = {}
        self._sets = ValidationSets({each.name: str(each.text) for each in self._texts}, OPTION)
        if plan.vocabulary.tokenizer_json is not None:
            raise UserError(
                "the recipe makes a new tokenizer, and a search needs one that a model has; write tokenizer: {source: "
                "MODEL} with a model of the recipe"
            )
        for objective in self._texts:
            if all(plan.dense) and objective.metric not in ("loss", "bits_per_byte"):
                raise UserError(f"{OPTION} {objective.name} is {objective.metric}, and no layer has experts; use loss")
        if self._texts:
            self._sets.check(plan)
        if self._tasks:
            self._check_tasks()

    def measure(self, model: Trinity, write: Callable[[], Path] | None = None) -> Figures:
        """All figures of the merged model.

        Args:
            model: the merged model, on the device.
            write: writes it as a folder for lm-eval.
        """
        tokenizer = self._plan.vocabulary.donor.tokenizer
        figures = {each.name: self._text(each.name, tokenizer).measure(model) for each in self._texts}
        if self._tasks and write is not None:
            figures |= self._run_tasks(write())
        return figures

    def measure_source(self, source: Source, model: Trinity) -> Figures:
        """The figures of a model of the recipe; without texts that its tokenizer cannot read, and tasks of a run."""
        tokenizer = source.tokenizer or self._plan.vocabulary.donor.tokenizer
        figures: Figures = {}
        for each in self._texts:
            try:
                text = self._text(each.name, tokenizer, model.config.vocab_size)
            except UserError:
                continue
            figures[each.name] = text.measure(model)
        if self._tasks and isinstance(source, FolderSource):
            figures |= self._run_tasks(source.folder)
        return figures

    def values(self, figures: Figures) -> dict[str, float]:
        """Name → the value of each objective that was measured.

        Raises:
            UserError: lm-eval does not report the metric.
        """
        found = {}
        for each in self.each:
            if each.name in figures and each.metric not in figures[each.name]:
                raise UserError(
                    f"{OPTION} {each.name}: lm-eval reports no {each.metric} for {each.task}; "
                    f"it reports {', '.join(figures[each.name])}"
                )
            if each.name in figures:
                found[each.name] = figures[each.name][each.metric]
        return found

    def cost(self, values: dict[str, float]) -> float:
        """Σ weight · value, with the values that are to become large subtracted; infinity if one is not finite."""
        total = math.fsum(each.weight * each.cost(values[each.name]) for each in self.each if each.weight)
        return total if math.isfinite(total) else math.inf

    def counted(self) -> list[Objective]:
        """The objectives that have a weight."""
        return [each for each in self.each if each.weight]

    def _text(self, name: str, tokenizer: Path | None, vocab_size: int | None = None) -> PackedText:
        assert tokenizer is not None  # ValidationSets.check refuses a merged model without one
        key = name, tokenizer
        if key not in self._packed:
            documents = self._sets.documents(name, tokenizer, vocab_size or self._plan.vocabulary.size)
            self._packed[key] = PackedText(documents, tokenizer, self._window, self._settings)
        return self._packed[key]

    def _check_tasks(self) -> None:
        from trinity.evaluation.lm_eval import known_tasks

        known_tasks([str(each.task) for each in self._tasks])
        if self._plan.vocabulary.donor.tokenizer is None:
            raise UserError(f"{OPTION} {self._plan.vocabulary.donor.label} has no tokenizer.json; add the file")

    def _run_tasks(self, folder: Path) -> Figures:
        from trinity.evaluation.lm_eval import run_tasks

        device, window = self._settings.device, self._window
        figures = {}
        for each in self._tasks:
            task = str(each.task)
            figures[each.name] = run_tasks(folder, [task], limit=each.limit, window=window, device=device)[task]
        return figures


def front(costs: Iterable[tuple[float, ...]]) -> list[int]:
    """The numbers of the points that no other is better than in one cost and no worse in all (Pareto), in order."""
    points = list(costs)
    return [
        number
        for number, point in enumerate(points)
        if all(map(math.isfinite, point))
        and not any(
            all(a <= b for a, b in zip(other, point)) and (other != point or at < number)
            for at, other in enumerate(points)
            if at != number
        )
    ]
