"""The file of a search: a merge recipe with one more key, `search`.

    merge_method: ties
    base_model: out/base
    models: [{model: out/code}, {model: out/prose}]
    search:
      vary:                         # each entry: one parameter of the recipe's methods
        - parameter: weight
          between: [0, 1]           # bounds
          models: [out/code]        # of which models; by default all that the parameter is of
          parts: [attention, experts, router, rest]   # one value for each; by default one for all tensors
          blocks: 2                 # one value for each of 2 blocks of layers; by default 1
          start: 0.5                # by default the recipe's value, else the middle
        - {parameter: density, between: [0.1, 1], tied: true}      # one value for all models
      objectives:                   # of a text: loss, bits_per_byte, max_violation, max_violation_mean, dead_experts
        - {name: code, text: data/code.jsonl, weight: 1, metric: loss}
        - {name: arc, task: arc_easy, metric: acc, goal: max, limit: 100, weight: 0.5}     # of lm-eval
      budget: {trials: 200, minutes: 30}     # one of them, or both: whichever ends first
      seed: 0
      population: 8                 # trials of a generation; by default 4 + 3 ln(number of variables)
      step: 0.25                    # first standard deviation of CMA-ES, as a share of the bounds
      try_first: [0, 1]             # before the search: all variables at this value, or at the bound next to it
      evaluation: {window: 512, rows: 50, document_mask: false, batch_tokens: 8192}

Without `search` the file is the recipe that the search starts from.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trinity.errors import UserError
from trinity.merging.parameters import nearest, number_of
from trinity.merging.recipe import read_yaml

PARTS = ("attention", "experts", "router", "rest")
METRICS = ("loss", "bits_per_byte", "max_violation", "max_violation_mean", "dead_experts")
_KEYS = ("vary", "objectives", "budget", "seed", "population", "step", "try_first", "evaluation")
_VARY = ("parameter", "between", "models", "parts", "blocks", "start", "tied")
_TEXT, _TASK = ("name", "text", "weight", "metric"), ("name", "task", "weight", "metric", "goal", "limit")
_EVALUATION: dict[str, type[int] | type[bool]] = {
    "window": int,
    "rows": int,
    "document_mask": bool,
    "batch_tokens": int,
}


@dataclass(frozen=True)
class Vary:
    """One entry of `vary`; see the top of the file. `where` names it in messages."""

    where: str
    parameter: str
    low: float
    high: float
    models: list[str] | None
    parts: list[str] | None
    blocks: int
    start: float | None
    tied: bool


@dataclass(frozen=True)
class Objective:
    """A value of the merged model.

    text, task: exactly one: text files or token shards; or a task of lm-eval, of which `limit` items at most.
    weight: in the sum that is minimised; 0: only recorded.
    maximize: the value is subtracted from the sum.
    """

    name: str
    text: str | None
    task: str | None
    metric: str
    weight: float
    maximize: bool
    limit: int | None

    def cost(self, value: float) -> float:
        """The value, negative if it is to become large."""
        return -value if self.maximize else value


@dataclass(frozen=True)
class SearchFile:
    """A checked search.

    recipe: content of the file without `search`.
    trials, minutes: the budget; None: no limit by this.
    evaluation: fields of RowSettings.
    text: the YAML that the folder of the search keeps.
    """

    recipe: dict[str, Any]
    vary: list[Vary]
    objectives: list[Objective]
    trials: int | None
    minutes: float | None
    seed: int
    population: int | None
    step: float
    try_first: list[float]
    evaluation: dict[str, Any]
    text: str

    @property
    def lasting(self) -> dict[str, Any]:
        """What may not change when a search is continued: all but the budget."""
        content = yaml.safe_load(self.text)
        content["search"] = {key: value for key, value in content["search"].items() if key != "budget"}
        return content


def read_search(file: str | Path | dict[str, Any]) -> SearchFile:
    """Read and check the file of a search; the recipe in it is read by read_recipe.

    Args:
        file: a YAML file, or its content.
    Raises:
        UserError: naming the wrong word or value.
    """
    if isinstance(file, dict):
        content, text = file, yaml.safe_dump(file, sort_keys=False, allow_unicode=True)
    else:
        content, text = read_yaml(file, "the search")
    raw = content.get("search")
    if not isinstance(raw, dict):
        raise UserError(f"the search file has search: {raw!r}; write vary, objectives and budget below it")
    _check_keys(raw, _KEYS, "search")
    entries = _list(raw, "vary", "nothing varies; write - {parameter: weight, between: [0, 1]}")
    objectives = [
        _objective(each, f"search.objectives[{n}]")
        for n, each in enumerate(_list(raw, "objectives", "write - {name: NAME, text: FILE}, or task: TASK"))
    ]
    names = [each.name for each in objectives]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"search.objectives names {name} twice; give each a name of its own")
    if not any(each.weight for each in objectives):
        raise UserError("search.objectives have the weight 0 all; give at least one of them a weight above 0")
    trials, minutes = _budget(raw.get("budget"))
    population = _whole(raw.get("population"), "search.population", 2)
    try_first = raw.get("try_first", [])
    if not isinstance(try_first, list):
        raise UserError(f"search.try_first is {try_first!r}; write a list of numbers")
    return SearchFile(
        recipe={key: value for key, value in content.items() if key != "search"},
        vary=[_vary(each, f"search.vary[{n}]") for n, each in enumerate(entries)],
        objectives=objectives,
        trials=trials,
        minutes=minutes,
        seed=_whole(raw.get("seed", 0), "search.seed", 0) or 0,
        population=population,
        step=_number(raw.get("step", 0.25), "search.step", 1e-6, 1),
        try_first=[_number(each, "search.try_first") for each in try_first],
        evaluation=_evaluation(raw.get("evaluation", {})),
        text=text,
    )


def merge_back(
    base: str,
    continued: str,
    validation: dict[str, str],
    weights: dict[str, float],
    *,
    by_part: bool = False,
    trials: int = 24,
    evaluation: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The search file of a merge back: base + α (continued - base), α between 0 and 1.

    Args:
        base: the model that training started from; gives config and tokenizer.
        continued: the model that was trained on.
        validation: name → text, whose losses are summed.
        weights: name → weight in the sum, 1 where not given.
        by_part: an α for each of attention, experts, router and rest.
        trials: the budget.
        evaluation: see the top of the file.
    Raises:
        UserError: a weight of an unknown text.
    """
    for name in weights:
        if name not in validation:
            raise UserError(f"--weights names {name!r}, which --validation does not; {nearest(name, validation)}")
    vary: dict[str, Any] = {"parameter": "weight", "between": [0.0, 1.0]} | ({"parts": list(PARTS)} if by_part else {})
    objectives = [{"name": name, "text": text, "weight": weights.get(name, 1.0)} for name, text in validation.items()]
    search: dict[str, Any] = {"vary": [vary], "objectives": objectives, "budget": {"trials": trials}, "seed": 0}
    if by_part:
        search["try_first"] = [0.0, 1.0]  # both models; the line search of one α begins with them anyway
    return {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [{"model": continued}],
        "search": search | ({"evaluation": evaluation} if evaluation else {}),
    }


def _vary(raw: Any, where: str) -> Vary:
    if not isinstance(raw, dict) or not isinstance(raw.get("parameter"), str):
        raise UserError(f"{where} is {raw!r}; write parameter: weight and between: [low, high]")
    _check_keys(raw, _VARY, where)
    bounds = raw.get("between")
    if not isinstance(bounds, list) or len(bounds) != 2:
        raise UserError(f"{where}.between is {bounds!r}; write the bounds, [low, high]")
    low, high = (_number(each, f"{where}.between") for each in bounds)
    if low >= high:
        raise UserError(f"{where}.between is {bounds}: nothing varies; the second bound must be larger than the first")
    parts, models, tied = raw.get("parts"), raw.get("models"), raw.get("tied", False)
    for key, value in (("parts", parts), ("models", models)):
        if value is not None and (not isinstance(value, list) or not value or len(set(map(str, value))) < len(value)):
            raise UserError(f"{where}.{key} is {value!r}; write a list of different names")
    for part in parts or []:
        if part not in PARTS:
            raise UserError(f"{where}.parts names {part!r}; {nearest(part, PARTS)}")
    if not isinstance(tied, bool):
        raise UserError(f"{where}.tied is {tied!r}; write true or false")
    start = raw.get("start")
    if start is not None:
        start = _number(start, f"{where}.start", low, high)
    blocks = _whole(raw.get("blocks", 1), f"{where}.blocks", 1) or 1
    return Vary(where, raw["parameter"], low, high, models, parts, blocks, start, tied)


def _objective(raw: Any, where: str) -> Objective:
    if not isinstance(raw, dict) or ("text" in raw) == ("task" in raw):
        raise UserError(f"{where} is {raw!r}; write name: and exactly one of text: and task:")
    of_text = "text" in raw
    _check_keys(raw, _TEXT if of_text else _TASK, where)
    for key in ("name", "text" if of_text else "task"):
        if not isinstance(raw.get(key), str) or not raw[key]:
            raise UserError(f"{where}.{key} is {raw.get(key)!r}; write a text")
    metric, goal = raw.get("metric", "loss" if of_text else "acc"), raw.get("goal", "min" if of_text else "max")
    if of_text and metric not in METRICS:
        raise UserError(f"{where}.metric is {metric!r}; {nearest(metric, METRICS)}")
    if not isinstance(metric, str):
        raise UserError(f"{where}.metric is {metric!r}; write a metric that lm-eval reports, such as acc")
    if goal not in ("min", "max"):
        raise UserError(f"{where}.goal is {goal!r}; write min or max")
    weight = _number(raw.get("weight", 1.0), f"{where}.weight", 0)
    limit = _whole(raw.get("limit"), f"{where}.limit", 1)
    return Objective(raw["name"], raw.get("text"), raw.get("task"), metric, weight, goal == "max", limit)


def _budget(raw: Any) -> tuple[int | None, float | None]:
    if not isinstance(raw, dict) or not raw:
        raise UserError(f"search.budget is {raw!r}; write {{trials: 200}} or {{minutes: 30}}")
    _check_keys(raw, ("trials", "minutes"), "search.budget")
    trials = _whole(raw.get("trials"), "search.budget.trials", 1)
    minutes = None if raw.get("minutes") is None else _number(raw["minutes"], "search.budget.minutes")
    if minutes is not None and minutes <= 0:
        raise UserError(f"search.budget.minutes is {minutes:g}; it must be above 0")
    if trials is None and minutes is None:
        raise UserError(f"search.budget is {raw!r}; write {{trials: 200}} or {{minutes: 30}}")
    return trials, minutes


def _evaluation(raw: Any) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise UserError(f"search.evaluation is {raw!r}; write a mapping, such as {{window: 512, rows: 50}}")
    _check_keys(raw, tuple(_EVALUATION), "search.evaluation")
    for key, value in raw.items():
        if type(value) is not _EVALUATION[key] or (_EVALUATION[key] is int and value < 1):
            wanted = "a whole number of at least 1" if _EVALUATION[key] is int else "true or false"
            raise UserError(f"search.evaluation.{key} is {value!r}; write {wanted}")
    return raw


def _check_keys(raw: dict[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in raw:
        if key not in known:
            raise UserError(f"{where} has the unknown key {key!r}; {nearest(key, known)}")


def _list(raw: dict[str, Any], key: str, advice: str) -> list[Any]:
    value = raw.get(key)
    if not isinstance(value, list) or not value:
        raise UserError(f"search.{key} is {value!r}: {advice}")
    return value


def _number(value: Any, where: str, low: float = -math.inf, high: float = math.inf) -> float:
    if isinstance(value, str):
        value = number_of(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where} is {value!r}; write a number")
    if not low <= value <= high:
        bounds = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise UserError(f"{where} is {value!r}; it must be {bounds}")
    return float(value)


def _whole(value: Any, where: str, low: int) -> int | None:
    """A whole number; None stays None."""
    if value is None:
        return None
    if type(value) is not int or value < low:
        raise UserError(f"{where} is {value!r}; write a whole number of at least {low}")
    return value
