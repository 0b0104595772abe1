"""What a search found, and the files that keep it: history, recipes, and the merged model."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trinity.io.json_files import write_json
from trinity.io.local import make_folder, write_atomically
from trinity.merging.folder_files import RECIPE
from trinity.merging.merge_models import merge
from trinity.merging.search.log import Trial
from trinity.merging.search.search_file import Objective
from trinity.merging.search.space import Variable

HISTORY, BEST, FRONT, MODEL, TRIAL_MODEL = "history.json", "best_recipe.yaml", "front", "model", "trial_model"


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    models: label → values of the recipe's models.
    best: the trial of the least cost.
    front: the trials of the Pareto front of the objectives that have a weight.
    stopped: why it ended.
    new: number of trials of this call; the others were in the log.
    """

    variables: list[Variable]
    objectives: list[Objective]
    models: dict[str, dict[str, float]]
    trials: list[Trial]
    best: Trial
    front: list[Trial]
    stopped: str
    new: int

    @property
    def counted(self) -> list[Objective]:
        """The objectives that have a weight."""
        return [each for each in self.objectives if each.weight]

    @property
    def seconds(self) -> float:
        """Of all trials."""
        return sum(trial.seconds for trial in self.trials)


def history(found: Found) -> dict[str, Any]:
    """The whole search as JSON holds it."""
    return {
        "variables": [
            {
                "name": v.name,
                "parameter": v.parameter,
                "low": v.low,
                "high": v.high,
                "start": v.start,
                "models": v.models,
            }
            for v in found.variables
        ],
        "objectives": [
            {"name": each.name, "metric": each.metric, "weight": each.weight, "goal": "max" if each.maximize else "min"}
            for each in found.objectives
        ],
        "models": found.models,
        "best": found.best.number,
        "front": [trial.number for trial in found.front],
        "stopped": found.stopped,
        "seconds": found.seconds,
        "trials": [trial.record() for trial in found.trials],
    }


def recipe_text(content: dict[str, Any], trial: Trial) -> str:
    """The recipe of a trial as YAML, its values in a comment."""
    values = ", ".join(f"{name} {value:.6g}" for name, value in trial.objectives.items())
    recipe = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    return f"# trial {trial.number} of a search: {values}\n{recipe}"


def write_results(
    folder: Path, found: Found, content_of: Callable[[list[float]], dict[str, Any]], workers: int, progress: bool
) -> None:
    """Write history and recipes, and merge the best one; files of an earlier end of this search are replaced.

    Args:
        folder: of the search.
        content_of: the recipe at the values of the variables.
    """
    write_json(folder / HISTORY, history(found))
    front = found.front if len(found.counted) > 1 else []
    recipes = {f"trial_{trial.number}.yaml": recipe_text(content_of(trial.values), trial) for trial in front}
    if recipes:
        make_folder(folder / FRONT)
        for path in (folder / FRONT).iterdir():
            if path.name not in recipes:
                path.unlink()
    for name, text in recipes.items():
        write_atomically(folder / FRONT / name, text)
    text = recipe_text(content_of(found.best.values), found.best)
    write_atomically(folder / BEST, text)
    kept = folder / MODEL / RECIPE
    if not (kept.is_file() and kept.read_text(encoding="utf-8") == text):
        merge(folder / BEST, folder / MODEL, workers=workers, overwrite=True, progress=progress)
    shutil.rmtree(folder / TRIAL_MODEL, ignore_errors=True)
