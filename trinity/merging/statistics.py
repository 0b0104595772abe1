"""How models differ, by layer and part: norms and cosines of their differences, conflicts of signs.

For one tensor, W_0 is the reference (the base, or else the first model), δ_i = W_i − W_0 the difference of model i, and
δ_m that of the merged model. All norms and cosines of these follow from the inner products of W_0, δ_1, …, δ_N, δ_m.
Inner products and counts are sums over entries, so they are added block by block, tensor by tensor, and over the
tensors of a part: no tensor need fit into memory.

Shapes: N models besides the reference, V = N + 2 vectors: W_0, δ_1, …, δ_N, δ_m; R rows, C columns of a block.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.merging.inputs import Inputs, Reader
from trinity.merging.plan import Job, Part, Plan
from trinity.merging.sources import Source
from trinity.terminal import Progress

MERGED = "merged model"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_PARTS = {
    "self_attn.q_proj.weight": "attention q",
    "self_attn.k_proj.weight": "attention k",
    "self_attn.v_proj.weight": "attention v",
    "self_attn.gate_proj.weight": "attention gate",
    "self_attn.o_proj.weight": "attention o",
    "mlp.gate_proj.weight": "FFN gate",
    "mlp.up_proj.weight": "FFN up",
    "mlp.down_proj.weight": "FFN down",
    "mlp.shared_experts.gate_proj.weight": "shared expert gate",
    "mlp.shared_experts.up_proj.weight": "shared expert up",
    "mlp.shared_experts.down_proj.weight": "shared expert down",
    "mlp.router.gate.weight": "router",
    "mlp.expert_bias": "expert bias",
}
EXPERTS = ("experts gate", "experts up", "experts down")
GAINS, ROUTER, BIAS = "norms", "router", "expert bias"
PARTS = ("norms", *list(_PARTS.values())[:11], *EXPERTS, ROUTER, BIAS)
"""The parts of a layer, in the order of the report's rows."""
OUTSIDE = ("embedding", "last norm", "LM head")
_OUTSIDE = dict(zip(("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"), OUTSIDE))


class Place(NamedTuple):
    """Where a tensor of the merged model is.

    layer: None outside of the layers. expert: None for all tensors but those of routed experts.
    """

    layer: int | None
    part: str
    expert: int | None = None


def place_of(name: str) -> Place:
    """The layer, part and expert of a tensor."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return Place(None, _OUTSIDE[name])
    layer, inner = int(match[1]), match[2]
    if expert := _EXPERT.fullmatch(inner):
        return Place(layer, f"experts {expert[2]}", int(expert[1]))
    return Place(layer, _PARTS.get(inner, GAINS))


@dataclass
class Sums:
    """Sums over the entries of some tensors; two can be added.

    gram_VV: float64, inner products of W_0, δ_1, …, δ_N, δ_m; 0 for a model that is not merged there.
    changed: entries that at least one model changed; conflicts: those that one model raised and another lowered.
    """

    gram_VV: Tensor
    elements: int = 0
    changed: int = 0
    conflicts: int = 0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.gram_VV + other.gram_VV,
            self.elements + other.elements,
            self.changed + other.changed,
            self.conflicts + other.conflicts,
        )

    def relative_norm(self, vector: int) -> float:
        """‖δ‖/‖W_0‖ of a vector; NaN where W_0 is 0."""
        return _ratio(self.gram_VV[vector, vector].sqrt(), self.gram_VV[0, 0].sqrt())

    def cosine(self, a: int, b: int) -> float:
        """The cosine of two differences; NaN where one is 0."""
        return _ratio(self.gram_VV[a, b], (self.gram_VV[a, a] * self.gram_VV[b, b]).sqrt())

    def weight_cosine(self, a: int, b: int) -> float:
        """The cosine of W_a and W_b, each W_0 + δ; a or b may be 0, which is W_0 itself."""
        chosen_2V = torch.zeros(2, len(self.gram_VV), dtype=torch.float64)
        chosen_2V[:, 0] = 1
        for row, vector in enumerate((a, b)):
            chosen_2V[row, vector] = 1
        inner = chosen_2V @ self.gram_VV @ chosen_2V.T
        return _ratio(inner[0, 1], (inner[0, 0] * inner[1, 1]).sqrt())

    @property
    def conflict_share(self) -> float:
        """Conflicts over changed entries; NaN where nothing changed."""
        return self.conflicts / self.changed if self.changed else float("nan")


@dataclass
class Statistics:
    """What differs.

    reference: label of the model that differences are from.
    models: labels of the others; a model that is merged several times into one tensor has several.
    sums: by place in the merged model.
    """

    reference: str
    models: list[str]
    sums: dict[Place, Sums] = field(default_factory=dict)

    @property
    def vectors(self) -> dict[str, int]:
        """Label → number of its difference, the merged model's last."""
        return {label: number for number, label in enumerate([*self.models, MERGED], start=1)}

    @property
    def layers(self) -> int:
        """Layers of the merged model."""
        return 1 + max((place.layer for place in self.sums if place.layer is not None), default=-1)

    def total(self, keep: Callable[[Place], bool]) -> Sums:
        """The sums over all places that `keep` accepts."""
        return _sum((each for place, each in self.sums.items() if keep(place)), len(self.models) + 2)

    def by_part(self) -> dict[tuple[int | None, str], Sums]:
        """(layer, part) → sums over its tensors, all experts together."""
        groups: dict[tuple[int | None, str], Sums] = {}
        for place, each in self.sums.items():
            key = place.layer, place.part
            groups[key] = groups[key] + each if key in groups else each
        return groups

    def by_expert(self) -> dict[tuple[int, int], Sums]:
        """(layer, expert) → sums over its three matrices."""
        groups: dict[tuple[int, int], Sums] = {}
        for place, each in self.sums.items():
            if place.layer is not None and place.expert is not None:
                key = place.layer, place.expert
                groups[key] = groups[key] + each if key in groups else each
        return groups


def compare(plan: Plan, read: Callable[[Part, Job], Reader], merged: Source, progress: bool = False) -> Statistics:
    """Compare the models of a merge with each other and with the result, tensor by tensor.

    Args:
        plan: the merge.
        read: the reader of an input, with its tokens and experts in the order of the merged model (Merger.reader).
        merged: the folder that the merge made.
        progress: show progress on stderr.
    Raises:
        UserError: a model holds NaN or infinity, or changed.
    """
    inputs = [_inputs(plan, job) for job in plan.jobs]
    names = dict.fromkeys(name for _, models in inputs for name in models)
    found = Statistics(_reference_label(plan), list(names))
    with Progress("comparing", plan.bytes_written, "B", progress, scaled=True) as done:
        for job, (reference, models) in zip(plan.jobs, inputs):
            readers = [read(part, job) for part in models.values()]
            readers.append(_whole_reader(merged, job.name))
            vectors = [0, *(found.vectors[name] for name in models), len(found.models) + 1]
            sums = _sums(Inputs(job.shape, read(reference, job), readers), vectors, len(found.models) + 2)
            place = place_of(job.name)
            found.sums[place] = found.sums[place] + sums if place in found.sums else sums
            done.update(job.bytes)
    return found


def _inputs(plan: Plan, job: Job) -> tuple[Part, dict[str, Part]]:
    """(the reference of a tensor, label → the other inputs)."""
    reference, models = job.base, list(job.models)
    if reference is None and plan.recipe.base is not None and not plan.recipe.has_layers:
        reference = Part(plan.recipe.base, job.name)  # the base of a method that does not use it
    if reference is None or plan.recipe.match_experts:
        reference = job.base or models[0]
    named: dict[str, Part] = {}
    for part in models:
        if part != reference:
            number = 1 + sum(other.label == part.label for other in named.values())
            named[part.label if number == 1 else f"{part.label} ({number})"] = part
    return reference, named


def _reference_label(plan: Plan) -> str:
    labels = {_inputs(plan, job)[0].label for job in plan.jobs}
    return next(iter(labels)) if len(labels) == 1 else "the first model of each slice"


def _whole_reader(source: Source, name: str) -> Reader:
    return lambda start, stop: source.read(name, start, stop)


def _sums(inputs: Inputs, vectors: list[int], size: int) -> Sums:
    """The sums of one tensor; vectors: the numbers of its reference, its models and the merged one."""
    total = Sums(torch.zeros(size, size, dtype=torch.float64))
    at = torch.tensor(vectors)
    for block in inputs:
        origin = block.origin.double()
        deltas = [model.double() - origin for model in block.models]
        columns = torch.stack([origin, *deltas]).flatten(1)
        total.gram_VV[at[:, None], at] += columns @ columns.T
        total.elements += origin.numel()
        if len(deltas) > 1:
            models = torch.stack(deltas[:-1])
            up, down = (models > 0).any(dim=0), (models < 0).any(dim=0)
            total.changed += int((up | down).sum())
            total.conflicts += int((up & down).sum())
    return total


def _sum(each: Iterable[Sums], size: int) -> Sums:
    return sum(each, start=Sums(torch.zeros(size, size, dtype=torch.float64)))


def _ratio(a: Tensor, b: Tensor) -> float:
    return float(a / b) if float(b) > 0 else float("nan")
