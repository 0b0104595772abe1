"""What a merge will do: for each tensor of the result, the inputs, the method and its parameters.

The plan is made from headers and the recipe alone. Whatever is wrong is found here.
"""

import inspect
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trinity.errors import UserError
from trinity.interop.tokenizer_files import special_ids
from trinity.merging.compatibility import check_architectures, check_slices, check_tensors
from trinity.merging.inputs import BLOCK, Combine
from trinity.merging.methods import METHODS, REQUIRED, Method
from trinity.merging.open_source import open_source
from trinity.merging.parameters import Scope, value_at
from trinity.merging.recipe import Recipe, Rule, Slice, SliceSource, rule_for
from trinity.merging.sources import Source
from trinity.merging.tensors import EMBED, HEAD, NORM, Described, layer_name, layer_tensors
from trinity.merging.vocabulary import Vocabulary, plan_vocabulary, template_notes


class Part(NamedTuple):
    """An input of a tensor: the model's label, and the tensor's name in it."""

    label: str
    name: str


@dataclass(frozen=True)
class Job:
    """One tensor of the result.

    merge, arguments: the method's function and its parameters.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    merge: Callable[..., Combine]
    arguments: dict[str, Any]
    base: Part | None
    models: list[Part]

    @property
    def method(self) -> str:
        """The function's name."""
        return self.merge.__name__

    @property
    def bytes(self) -> int:
        """Bytes of the tensor in the output."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def parts(self) -> list[Part]:
        """All inputs."""
        return self.models + ([] if self.base is None else [self.base])


@dataclass(frozen=True)
class Plan:
    """A checked merge.

    sources: every model by its label.
    donor: the model that gives config.json.
    jobs: the tensors of the result, in the order in which they are written.
    dense, is_global: kinds of the layers of the result.
    notes: remarks for the user.
    left_out: label → number of its tensors in layers that no slice takes, or where a rule's method does not.
    """

    recipe: Recipe
    sources: dict[str, Source]
    donor: Source
    vocabulary: Vocabulary
    jobs: list[Job]
    dtype: torch.dtype
    dense: list[bool]
    is_global: list[bool]
    notes: list[str]
    left_out: dict[str, int]

    @property
    def tensors_read(self) -> int:
        """Tensors of all models that the result is made of."""
        return len(self._parts())

    @property
    def bytes_read(self) -> int:
        """Bytes of these tensors on the disk."""
        entries = (self.sources[label].entries[name] for label, name in self._parts())
        return sum(prod(entry.shape) * entry.dtype.itemsize for entry in entries)

    @property
    def bytes_written(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(job.bytes for job in self.jobs)

    def working_bytes(self, workers: int) -> int:
        """Upper bound of the memory that the merge takes, without that of Python and its libraries.

        Each worker holds the blocks of one tensor: the inputs, their differences, and a method's intermediate values.
        """
        most = max(len(job.parts) for job in self.jobs)
        longest = max(job.shape[-1] for job in self.jobs)
        total = workers * max(BLOCK, longest) * 4 * (2 * most + _INTERMEDIATE)
        if self.vocabulary.rows is not None:
            vocabulary, width = self.vocabulary.size, self.donor.config.width
            total += workers * vocabulary * width * 4 * (len(self.sources) + 1)
        return total + sum(getattr(source, "chunk_bytes", 0) for source in self.sources.values())

    def summary(self, workers: int) -> str:
        """What the merge will do, for people: models, methods, bytes, memory."""
        methods = Counter(job.method for job in self.jobs)
        process = anonymous_bytes()
        lines = [
            f"models:   {', '.join(self.sources)}",
            f"config:   {self.donor.label}; tokenizer: {self.vocabulary.donor.label}",
            f"layers:   {len(self.dense)}, of which {sum(self.dense)} dense; {self.vocabulary.size:,} rows of tokens",
            f"methods:  {', '.join(f'{name} for {count:,} tensors' for name, count in methods.most_common())}",
            f"reads:    {self.tensors_read:,} tensors, {self.bytes_read / 1e9:.3f} GB",
            f"writes:   {len(self.jobs):,} tensors, {self.bytes_written / 1e9:.3f} GB, matrices in "
            f"{str(self.dtype).removeprefix('torch.')}",
            f"memory:   at most {(self.working_bytes(workers) + process) / 1e9:.2f} GB, of which "
            f"{process / 1e9:.2f} GB are Python and its libraries",
        ]
        lines += [f"left out: {count:,} tensors of {label}, which no slice, rule or method takes" for label, count in
                  self.left_out.items()]  # fmt: skip
        return "\n".join(lines + [f"note:     {note}" for note in self.notes])

    def _parts(self) -> set[Part]:
        return {part for job in self.jobs for part in job.parts}


def anonymous_bytes() -> int:
    """Anonymous memory of this process now, in bytes; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


_INTERMEDIATE = 14
"""Most blocks of fp32 that a method holds besides its inputs and their differences (arcee_fusion: five in float64)."""


def make_plan(recipe: Recipe) -> Plan:
    """Open the models, check that they fit together and to the recipe, and plan every tensor.

    Raises:
        UserError: naming what is wrong.
    """
    sources = _open(recipe)
    for source in sources.values():
        check_tensors(source)
    base = sources.get(recipe.base) if recipe.base else None
    first = recipe.slices[0].sources[0].model
    donor = base or sources[first]
    notes = check_architectures(recipe, list(sources.values()))
    vocabulary = plan_vocabulary(recipe.tokenizer, sources, donor, base)
    if vocabulary.donor.tokenizer is not None:
        special_ids(
            vocabulary.donor.tokenizer, vocabulary.size
        )  # refuses what generation_config.json cannot be made of
    notes += template_notes(recipe.chat_template, sources.values(), vocabulary.donor)
    slices = recipe.slices if recipe.has_layers else [_all_layers(recipe.slices[0], donor)]
    dense, is_global = check_slices(slices, sources)
    if is_global != [donor.config.is_global(layer) for layer in range(len(is_global))]:
        notes.append(
            f"the slices break the order of local and global layers (every {donor.config.global_every}th is global); "
            "transformers reads the merged folder, load_hf and init.hf do not"
        )
    dtype = _output_dtype(recipe, donor)
    planner = _Planner(recipe, sources, donor, vocabulary, dtype)
    jobs = list(planner.jobs(slices, dense))
    used = Counter(part.label for part in {part for job in jobs for part in job.parts})
    counts = {label: len(source.entries) for label, source in sources.items()}
    left_out = {label: counts[label] - used[label] for label in sources}
    notes += vocabulary.notes + [
        f"{label} gives config and tokenizer, and no weights"
        for label, left in left_out.items()
        if left == counts[label]
    ]
    left_out = {label: left for label, left in left_out.items() if 0 < left < counts[label]}
    return Plan(recipe, sources, donor, vocabulary, jobs, dtype, dense, is_global, notes, left_out)


def plan_jobs(plan: Plan, recipe: Recipe) -> list[Job]:
    """The tensors of a recipe that differs from the plan's in parameters alone: models and tokenizer stay.

    Raises:
        UserError: naming the parameter that is wrong.
    """
    slices = recipe.slices if recipe.has_layers else [_all_layers(recipe.slices[0], plan.donor)]
    return list(_Planner(recipe, plan.sources, plan.donor, plan.vocabulary, plan.dtype).jobs(slices, plan.dense))


class _Planner:
    """Makes the jobs of a recipe."""

    def __init__(
        self, recipe: Recipe, sources: dict[str, Source], donor: Source, vocabulary: Vocabulary, dtype: torch.dtype
    ) -> None:
        self._recipe, self._sources, self._donor = recipe, sources, donor
        self._vocabulary, self._dtype = vocabulary, dtype
        self._matched: set[int] = set()

    def jobs(self, slices: list[Slice], dense: list[bool]) -> Iterator[Job]:
        """All tensors of the result, in order."""
        config, size = self._donor.config, self._vocabulary.size
        yield self._job(slices[0], Described(EMBED, (size, config.width), "matrix"), None, 0.0)
        layer = 0
        for part in slices:
            first, end = part.sources[0].layers or (0, 0)
            for offset in range(end - first):
                t = offset / (end - first - 1) if end - first > 1 else 1.0
                for described in layer_tensors(config, dense[layer]):
                    named = described._replace(name=layer_name(layer, described.name))
                    yield self._job(part, named, (offset, described.name), t)
                layer += 1
        yield self._job(slices[-1], Described(NORM, (config.width,), "gain"), None, 0.0)
        yield self._job(slices[-1], Described(HEAD, (size, config.width), "matrix"), None, 0.0)
        for number, rule in enumerate(self._recipe.rules):
            if number not in self._matched:
                raise UserError(f"rules[{number}].match {rule.match.pattern!r} is found in no tensor's name; mend it")

    def _job(self, part: Slice, described: Described, in_layer: tuple[int, str] | None, t: float) -> Job:
        rule = rule_for(self._recipe.rules, described.name)
        self._matched |= {n for n, each in enumerate(self._recipe.rules) if each.match.search(described.name)}
        name = rule.method if rule is not None and rule.method else part.method
        method = METHODS[name]
        models, base = self._inputs(part, method, rule)
        self._check_numbers(name, method, len(models), base)
        scopes = [rule.parameters] if rule is not None else []
        values = _values(name, method, models, scopes, [part.parameters, self._recipe.parameters], described.name, t)
        function = method.merge
        if described.kind != "matrix" and method.smooth is not None and (rule is None or rule.method is None):
            function, values = method.smooth, _smooth_values(values)
        _check_values(function, name, values, described.name)
        arguments = {each: values[each] for each in _signature(function)}
        dtype = self._dtype if described.kind == "matrix" else torch.float32
        at = [Part(source.model, _name_in(source, in_layer, described)) for source in models]
        origin = None if base is None else Part(base.model, _name_in(base, in_layer, described))
        return Job(described.name, described.shape, dtype, function, arguments, origin, at)

    def _inputs(self, part: Slice, method: Method, rule: Rule | None) -> tuple[list[SliceSource], SliceSource | None]:
        """(the models that are merged, the base if the method takes it)."""
        if rule is not None and rule.model is not None:
            found = [each for each in part.sources if each.model == rule.model]
            if not found and rule.model == self._recipe.base:
                found = [self._base(part)]
            if not found:
                raise UserError(f"rules: {rule.model} is none of the models that are merged there; name one of them")
            return found[:1], None
        if method.base == "no" or self._recipe.base is None:
            return part.sources, None
        others = [each for each in part.sources if each.model != self._recipe.base]
        return others, self._base(part)

    def _base(self, part: Slice) -> SliceSource:
        """The base's layers in a slice: those it is listed with, else the same as the models'."""
        for each in part.sources:
            if each.model == self._recipe.base:
                return each
        ranges = {each.layers for each in part.sources}
        if len(ranges) > 1:
            raise UserError("the sources of a slice take different layers; list base_model among them with its layers")
        assert self._recipe.base is not None
        return SliceSource(self._recipe.base, next(iter(ranges)), {})

    def _check_numbers(self, name: str, method: Method, count: int, base: SliceSource | None) -> None:
        if method.base == "yes" and base is None:
            raise UserError(f"{name} needs a base_model; write base_model: MODEL")
        low, high = method.models
        if not low <= count <= (high or math.inf):
            wanted = f"{low}" if low == high else f"at least {low}"
            beside = " besides base_model" if base is not None else ""
            raise UserError(f"{name} merges {wanted} model{'s' * (low > 1)}{beside}; the recipe gives {count}")


def _open(recipe: Recipe) -> dict[str, Source]:
    """Every model by its label; two labels of one model are refused."""
    sources: dict[str, Source] = {}
    labels: dict[tuple, str] = {}
    for label in recipe.models:
        source = open_source(label)
        key = (os.path.realpath(source.folder), getattr(source, "step", None))
        if key in labels:
            raise UserError(f"{labels[key]} and {label} are the same model; write it the same way everywhere")
        labels[key] = label
        sources[label] = source
    return sources


def _all_layers(part: Slice, donor: Source) -> Slice:
    layers = (0, donor.config.layers)
    return Slice([SliceSource(each.model, layers, each.parameters) for each in part.sources], {}, part.method)


def _name_in(source: SliceSource, in_layer: tuple[int, str] | None, described: Described) -> str:
    if in_layer is None:
        return described.name
    assert source.layers is not None
    return layer_name(source.layers[0] + in_layer[0], in_layer[1])


def _values(
    name: str, method: Method, models: list[SliceSource], rule: list[Scope], wider: list[Scope], tensor: str, t: float
) -> dict[str, Any]:
    """The parameters of a method for one tensor, defaults included."""
    values: dict[str, Any] = {}
    for parameter, default in method.per_model.items():
        values[parameter] = [
            value_at([*rule, model.parameters, *wider], parameter, tensor, t, default) for model in models
        ]
        if any(value is REQUIRED for value in values[parameter]):
            model = models[[value is REQUIRED for value in values[parameter]].index(True)].model
            raise UserError(
                f"{name} needs a {parameter} for {model} ({tensor}); write {parameter}: NUMBER among its parameters"
            )
    for parameter, default in method.whole.items():
        values[parameter] = value_at([*rule, *wider], parameter, tensor, t, default)
        if values[parameter] is REQUIRED:
            raise UserError(f"{name} needs {parameter} ({tensor}); write {parameter}: NUMBER among parameters")
    if "lambda" in values:
        values["lambda_"] = values.pop("lambda")
    return values


def _smooth_values(values: dict[str, Any]) -> dict[str, Any]:
    return {"normalize": values.get("normalize_weights", True)} | values


def _signature(function: Any) -> list[str]:
    if function not in _signatures:
        _signatures[function] = [name for name in inspect.signature(function).parameters if name != "inputs"]
    return _signatures[function]


_signatures: dict[Any, list[str]] = {}


_DIVIDES = {"multislerp": "normalize_weights"} | dict.fromkeys(
    ("linear", "task_arithmetic", "dare_linear", "della_linear", "breadcrumbs"), "normalize"
)
"""Function → the parameter with which it divides by the sum of the weights."""


def _check_values(function: Any, name: str, values: dict[str, Any], tensor: str) -> None:
    """Refuse values that each are in bounds but make no sense together."""
    divides = values.get(_DIVIDES.get(function.__name__, ""), function.__name__ == "nuslerp")
    if divides and abs(math.fsum(values["weight"])) < 1e-12:
        raise UserError(f"the weights of {name} sum to 0 at {tensor}, and it divides by the sum; change the weights")
    if name == "slerp" and values["t"] > 1:
        raise UserError(f"t of slerp is {values['t']} at {tensor}; it must be between 0 and 1")
    drops = "density" in values and "epsilon" in values
    for density, epsilon in zip(values["density"], values["epsilon"]) if drops else ():
        if density < 1 and not (epsilon <= density and density + epsilon <= 1):
            raise UserError(
                f"density {density} ± epsilon {epsilon} of {name} leaves 0 … 1 at {tensor}; use an epsilon of at most "
                f"{math.floor(min(density, 1 - density) * 1e6 + 1e-6) / 1e6:g}"
            )


def _output_dtype(recipe: Recipe, donor: Source) -> torch.dtype:
    """The data type of the matrices: the recipe's, else that of the config's donor; float64 masters become float32."""
    if recipe.out_dtype is not None:
        return getattr(torch, recipe.out_dtype)
    stored = donor.entries[HEAD].dtype
    return torch.float32 if stored == torch.float64 else stored
