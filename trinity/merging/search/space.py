"""The variables of a search, and the recipe at given values of them.

A variable is one number: a parameter, of a model or of the whole merge, for a part of the tensors in a block of layers.
At given values the recipe is an ordinary one: a variable for all tensors is a plain number, others are filters by parts
of tensor names. So `tools/merge.py` repeats a trial, and the search plans it by the same code.

Parts: attention (with its gates and norms of q and k), experts (routed and shared), router (and expert_bias), and the
rest: embedding, head, gains, dense FFNs. Outside of the layers, the embedding belongs to the first block, norm and head
to the last.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from trinity.errors import UserError
from trinity.merging.methods import METHODS
from trinity.merging.parameters import PARAMETERS, nearest
from trinity.merging.plan import Job, Plan, make_plan, plan_jobs
from trinity.merging.recipe import Recipe, read_recipe
from trinity.merging.search.search_file import PARTS, SearchFile, Vary

_EXPERTS = ("mlp.experts.", "mlp.shared_experts.")
_ROUTER = ("mlp.router.", "mlp.expert_bias")
_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm")
_DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_BEFORE, _AFTER = ("embed_tokens",), ("model.norm", "lm_head")
_DIGITS = 6


@dataclass(frozen=True)
class Variable:
    """One number of a search.

    name: for people.
    parameter, low, high, start: see search_file.py.
    models: whose parameter it is; empty: of the whole merge.
    filters: parts of names of the tensors that it is for; None: all tensors.
    where: its entry of the file, for messages.
    """

    name: str
    parameter: str
    low: float
    high: float
    start: float
    models: tuple[str, ...]
    filters: tuple[str, ...] | None
    where: str

    def value_at(self, share: float) -> float:
        """The value at a point between the bounds, 0 to 1, rounded to six digits: it is also what recipes say."""
        value = float(f"{self.low + (self.high - self.low) * share:.{_DIGITS}g}")
        return min(max(value, self.low), self.high)

    def share_of(self, value: float) -> float:
        """The point between the bounds, 0 to 1, that is nearest to a value."""
        return (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)


class SearchSpace:
    """All variables of a search.

    Args:
        search: the file.

    Attributes:
        variables: in the order of the file.
        plan: of the recipe; its jobs are those of some values.

    Raises:
        UserError: the recipe or the models are wrong; an unknown parameter, model or part, bounds that make no merge,
            or a variable that changes nothing.
    """

    def __init__(self, search: SearchFile) -> None:
        self._content = search.recipe
        recipe = read_recipe(search.recipe)
        models = [_models(vary, recipe) for vary in search.vary]
        self.plan = make_plan(read_recipe(_filled(search, models)))
        self.variables = [
            variable
            for vary, each in zip(search.vary, models)
            for variable in _variables(vary, each, search.recipe, self.plan)
        ]
        self.jobs(self.start)
        for number, variable in enumerate(self.variables):
            self._check_effect(number, variable)

    @property
    def start(self) -> list[float]:
        """The value of each variable from which the search starts."""
        return [variable.start for variable in self.variables]

    def recipe_content(self, values: Sequence[float]) -> dict[str, Any]:
        """The recipe at these values, as YAML holds it."""
        content = copy.deepcopy(self._content)
        for scope, parameter, entries in self._assignments(content, values):
            scope[parameter] = entries
        return content

    def jobs(self, values: Sequence[float]) -> list[Job]:
        """The tensors of the merge at these values.

        Raises:
            UserError: values that each are in bounds make no sense together.
        """
        return plan_jobs(self.plan, read_recipe(self.recipe_content(values), text=""))  # writing YAML takes longer

    def _assignments(self, content: dict[str, Any], values: Sequence[float]) -> Iterator[tuple[dict, str, Any]]:
        """(scope of the recipe, parameter, value) of everything that varies."""
        targets: dict[tuple[str, str | None], list[tuple[Variable, float]]] = {}
        for variable, value in zip(self.variables, values, strict=True):
            for model in variable.models or (None,):
                targets.setdefault((variable.parameter, model), []).append((variable, value))
        for (parameter, model), varied in targets.items():
            for scope in _scopes(content, model):
                yield scope, parameter, _value(varied, scope.get(parameter))

    def _check_effect(self, number: int, variable: Variable) -> None:
        """Plan the merge at both bounds: refuse bounds that make none, and a variable that changes no tensor."""
        ends = []
        for bound in (variable.low, variable.high):
            values = self.start
            values[number] = bound
            try:
                ends.append(self.jobs(values))
            except UserError as error:
                raise UserError(f"{variable.where}: {variable.name} at {bound:g}: {error}") from None
        if all(low.arguments == high.arguments for low, high in zip(*ends)):
            raise UserError(
                f"{variable.where}: {variable.name} changes no tensor, or is varied by another entry already; leave it "
                "out"
            )


def part_filters(part: str, layers: Iterable[int] | None, dense: list[bool]) -> list[str]:
    """Parts of names that exactly the tensors of a part have, each in one.

    Args:
        part: one of PARTS.
        layers: of these layers; None: of all layers, and outside of them.
        dense: whether each layer of the model is dense.
    """
    if layers is None:
        rest = (*_NORMS, *(_DENSE if any(dense) else ()), *_BEFORE, *_AFTER)
        moe = not all(dense)
        return list({"attention": ("self_attn.",), "experts": _EXPERTS * moe, "router": _ROUTER * moe}.get(part, rest))
    found: list[str] = []
    for layer in layers:
        rest = _NORMS + (_DENSE if dense[layer] else ())
        moe = not dense[layer]
        names = {"attention": ("self_attn.",), "experts": _EXPERTS * moe, "router": _ROUTER * moe}.get(part, rest)
        found += [f"layers.{layer}.{name}" for name in names]
    return found


def block_layers(layers: int, blocks: int) -> list[range]:
    """The layers of each of several blocks, whose lengths differ by at most 1."""
    ends = [layers * number // blocks for number in range(blocks + 1)]
    return [range(first, end) for first, end in pairwise(ends)]


def _filled(search: SearchFile, models: list[list[tuple[str, ...]]]) -> dict[str, Any]:
    """The recipe with a value for every varied parameter that has none."""
    content = copy.deepcopy(search.recipe)
    for vary, variables in zip(search.vary, models):
        for each in variables:
            for model in each or (None,):
                for scope in _scopes(content, model):
                    scope.setdefault(vary.parameter, _start(vary, each, search.recipe))
    return content


def _variables(vary: Vary, owners: list[tuple[str, ...]], content: dict[str, Any], plan: Plan) -> Iterator[Variable]:
    groups = list(_groups(vary, plan.dense))
    for models in owners:
        for group, filters in groups:
            owner = f" of {models[0]}" if len(models) == 1 else ""
            start = _start(vary, models, content)
            name = f"{vary.parameter}{owner}{group}"
            yield Variable(name, vary.parameter, vary.low, vary.high, start, models, filters, vary.where)


def _models(vary: Vary, recipe: Recipe) -> list[tuple[str, ...]]:
    """The models of each variable of an entry; [()]: the parameter is of the whole merge."""
    methods = [part.method for part in recipe.slices] + [rule.method for rule in recipe.rules if rule.method]
    per_model = {name for method in methods for name in METHODS[method].per_model}
    known = per_model | {name for method in methods for name in METHODS[method].whole}
    if vary.parameter not in known:
        raise UserError(f"{vary.where}.parameter {vary.parameter!r} is none of the recipe's methods; "
                        f"{nearest(vary.parameter, known)}")  # fmt: skip
    parameter = PARAMETERS[vary.parameter]
    if parameter.kind is not float or parameter.words:
        raise UserError(f"{vary.where}.parameter {vary.parameter} is no real number; vary another parameter")
    for bound in (vary.low, vary.high):
        parameter.read(bound, f"{vary.where}.between")
    if vary.parameter not in per_model:
        if vary.models or vary.tied:
            raise UserError(f"{vary.where}: {vary.parameter} is of the whole merge; leave out models and tied")
        return [()]
    base_counts = any(METHODS[method].base == "no" for method in methods)
    named = [each.model for part in recipe.slices for each in part.sources]
    merged = [model for model in dict.fromkeys(named) if base_counts or model != recipe.base]
    for model in vary.models or []:
        if model not in merged:
            raise UserError(f"{vary.where}.models names {model!r}; {nearest(model, merged)}")
    chosen = vary.models or merged
    return [tuple(chosen)] if vary.tied else [(model,) for model in chosen]


def _groups(vary: Vary, dense: list[bool]) -> Iterator[tuple[str, tuple[str, ...] | None]]:
    """(end of the name, filters) of each group of tensors of an entry."""
    if vary.blocks > len(dense):
        raise UserError(f"{vary.where}.blocks is {vary.blocks}; write at most {len(dense)}, the layers of the model")
    if vary.parts is None and vary.blocks == 1:
        yield "", None
        return
    for part in vary.parts or []:
        if not part_filters(part, None, dense):
            raise UserError(f"{vary.where}.parts names {part}, and the model has none; leave it out")
    blocks = block_layers(len(dense), vary.blocks)
    for number, layers in enumerate(blocks):
        outside = (_BEFORE if number == 0 else ()) + (_AFTER if number == len(blocks) - 1 else ())
        where = f", layers {layers[0]}-{layers[-1]}" if len(blocks) > 1 else ""
        if vary.parts is None:
            yield where, (*(f"layers.{layer}." for layer in layers), *outside)
        for part in vary.parts or []:
            found = part_filters(part, layers if len(blocks) > 1 else None, dense)
            if len(blocks) > 1 and part == PARTS[-1]:
                found += outside
            if found:  # a block of dense layers has no experts
                yield f", {part}{where}", tuple(found)


def _start(vary: Vary, models: tuple[str, ...], content: dict[str, Any]) -> float:
    """The value that the file gives; else the recipe's, if it is one number; else the middle of the bounds."""
    if vary.start is not None:
        return vary.start
    scopes = [each for each in _sources(content) if models and _label(each) == models[0]] + [content]
    for scope in scopes:
        value = (scope.get("parameters") or {}).get(vary.parameter)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return min(max(float(value), vary.low), vary.high)
    return (vary.low + vary.high) / 2


def _value(varied: list[tuple[Variable, float]], old: Any) -> Any:
    """The value of a parameter in a scope: a number, or filters that end with the recipe's own value."""
    if varied[0][0].filters is None:
        return varied[0][1]
    filters = [{"filter": each, "value": value} for variable, value in varied for each in variable.filters or ()]
    if old is None:
        return filters
    if isinstance(old, dict):
        old = [old]
    has_filters = isinstance(old, list) and any(isinstance(each, dict) for each in old)
    return filters + (old if has_filters else [{"filter": "*", "value": old}])


def _scopes(content: dict[str, Any], model: str | None) -> Iterator[dict[str, Any]]:
    """The parameters of a model, wherever the recipe names it, or of the whole recipe; they are added if missing."""
    for owner in [content] if model is None else [each for each in _sources(content) if _label(each) == model]:
        if owner.get("parameters") is None:
            owner["parameters"] = {}
        yield owner["parameters"]


def _sources(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The entries of a recipe that name a model and its parameters; the recipe was checked."""
    if "modules" in content:
        content = content["modules"]["default"]
    yield from content.get("models") or []
    for each in content.get("slices") or []:
        yield from each["sources"]


def _label(source: dict[str, Any]) -> str:
    model = source["model"]
    while isinstance(model, dict):  # mergekit's {model: {path: …}}
        model = model["model"] if "model" in model else model["path"]
    return model
