"""Do experts with the same number belong together? Correlation of models, and matching of permuted experts.

A merge by index presumes a common ancestor. The experts of models that were trained independently, or were reordered,
are permuted (arXiv 2509.11348), and so are the neurons within each. With `match_experts: true` the experts of every
other model are brought into the order of the first (the base, if the method has one): the assignment with the largest
total similarity, first of experts, by router rows and up-projections, then of the neurons of each pair.

Shapes: E experts, F width of an expert, D model width.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from trinity.merging.plan import Job, Part, Plan
from trinity.merging.sources import Source

RELATED = 0.5
"""Models with a common ancestor correlate by more than this; independent ones by about 0."""
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.mlp\.(router\.gate\.weight|expert_bias)")
_ROUTER, _ATTENTION = "mlp.router.gate.weight", "self_attn.o_proj.weight"
_KEPT = 8


class Order(NamedTuple):
    """Where the experts of a model's layer go: experts [E] and neurons [E, F], its index for each of the first's."""

    experts: Tensor
    neurons: Tensor


def unrelated_models(plan: Plan) -> list[str]:
    """Remarks on models whose routers do not correlate with those of the model that comes first in the merge."""
    routers, weights = _correlations(plan, _ROUTER), _correlations(plan, _ATTENTION)
    notes = []
    for (first, other), value in routers.items():
        if value < RELATED:
            advice = (
                "their experts are matched first"
                if plan.recipe.match_experts
                else "try match_experts: true if it is "
                "the same model with its experts in another order, and else do not merge them"
            )
            notes.append(
                f"the routers of {first} and {other} correlate by {value:.2f}, their attention weights by "
                f"{weights.get((first, other), 1):.2f}: expert by expert they have no common ancestor; {advice}"
            )
    return notes


class ExpertMatcher:
    """Reads the experts of a model in the order of another's.

    Args:
        sources: every model by its label.
        keep_all: keep the orders of all layers, not only of the last ones.
    """

    def __init__(self, sources: dict[str, Source], keep_all: bool = False) -> None:
        self._sources, self._keep_all = sources, keep_all
        self._orders: OrderedDict[tuple[str, int, str, int], Order] = OrderedDict()
        self._lock = Lock()

    def read(self, part: Part, first: Part) -> Tensor | None:
        """A tensor of the part's model in the order of the first's; None if its order does not depend on experts.

        Returns:
            the whole tensor as the source counts rows, in fp32.
        """
        source = self._sources[part.label]
        if match := _LAYER.fullmatch(part.name):
            order = self._order(first, part, int(match[1]))
            whole = _whole(source, part.name)
            return whole[order.experts] if match[2] != "expert_bias" else whole[:, order.experts]
        if not (match := _EXPERT.fullmatch(part.name)):
            return None
        order, expert = self._order(first, part, int(match[1])), int(match[2])
        name = f"model.layers.{match[1]}.mlp.experts.{int(order.experts[expert])}.{match[3]}_proj.weight"
        whole = _whole(source, name)
        neurons = order.neurons[expert]
        return whole[:, neurons] if match[3] == "down" else whole[neurons]

    def _order(self, first: Part, part: Part, layer: int) -> Order:
        key = (first.label, int(first.name.split(".")[2]), part.label, layer)
        with self._lock:
            if key not in self._orders:
                self._orders[key] = match_layer(self._sources[first.label], key[1], self._sources[part.label], layer)
                while len(self._orders) > _KEPT and not self._keep_all:
                    self._orders.popitem(last=False)
            return self._orders[key]


def match_layer(first: Source, first_layer: int, other: Source, layer: int) -> Order:
    """The order of the other model's experts, and of the neurons of each, that fits the first model best."""
    routers = [_whole(first, f"model.layers.{first_layer}.{_ROUTER}"), _whole(other, f"model.layers.{layer}.{_ROUTER}")]
    profiles = [
        torch.stack([_profile(source, at, expert) for expert in range(source.config.experts)])
        for source, at in ((first, first_layer), (other, layer))
    ]
    similarity = sum(normalize(a - a.mean(1, True), dim=1) @ normalize(b - b.mean(1, True), dim=1).T
                     for a, b in (routers, profiles))  # fmt: skip
    assert isinstance(similarity, Tensor)
    experts = assignment(-similarity)
    neurons = [
        assignment(-_neuron_similarity(first, first_layer, expert, other, layer, int(matched)))
        for expert, matched in enumerate(experts)
    ]
    return Order(experts, torch.stack(neurons))


def assignment(cost: Tensor) -> Tensor:
    """The permutation p that minimises Σ cost[i, p(i)], by shortest augmenting paths (Jonker and Volgenant); O(n³).

    Args:
        cost: [n, n].
    Returns:
        [n] int64.
    """
    c = cost.double().numpy()
    n = len(c)
    u, v = np.zeros(n + 1), np.zeros(n + 1)
    row_of = np.full(n + 1, n)  # of a column; column n starts every path
    for row in range(n):
        row_of[n] = row
        column, least, before = n, np.full(n, np.inf), np.full(n, n)
        done = np.zeros(n + 1, dtype=bool)
        while row_of[column] != n:
            done[column] = True
            reduced = c[row_of[column]] - u[row_of[column]] - v[:n]
            closer = ~done[:n] & (reduced < least)
            least[closer], before[closer] = reduced[closer], column
            next_column = int(np.where(done[:n], np.inf, least).argmin())
            step = least[next_column]
            u[row_of[done]] += step
            v[done] -= step
            least[~done[:n]] -= step
            column = next_column
        while column != n:
            row_of[column] = row_of[before[column]]
            column = before[column]
    found = np.empty(n, dtype=np.int64)
    found[row_of[:n]] = np.arange(n)
    return torch.from_numpy(found)


def _profile(source: Source, layer: int, expert: int) -> Tensor:
    """Norms of the columns of an up-projection, [D]: they do not depend on the order of the neurons."""
    return _whole(source, f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight").norm(dim=0)


def _neuron_similarity(first: Source, at: int, expert: int, other: Source, layer: int, matched: int) -> Tensor:
    """[F, F]: inner products of the neurons' rows of gate and up and columns of down."""
    total = torch.zeros(first.config.expert_width, first.config.expert_width)
    for name in ("gate", "up", "down"):
        here = _whole(first, f"model.layers.{at}.mlp.experts.{expert}.{name}_proj.weight")
        there = _whole(other, f"model.layers.{layer}.mlp.experts.{matched}.{name}_proj.weight")
        total += here.T @ there if name == "down" else here @ there.T
    return total


def _correlations(plan: Plan, suffix: str) -> dict[tuple[str, str], float]:
    """(first model, other model) → mean cosine of their tensors of this name over the MoE layers."""
    found: dict[tuple[str, str], list[float]] = {}
    for job in _with_router(plan.jobs, suffix):
        first, *others = first_and_others(job)
        here = _whole(plan.sources[first.label], first.name)
        for other in others:
            there = _whole(plan.sources[other.label], other.name)
            cosine = torch.nn.functional.cosine_similarity(here.view(-1), there.view(-1), dim=0)
            found.setdefault((first.label, other.label), []).append(float(cosine))
    return {pair: sum(values) / len(values) for pair, values in found.items()}


def _with_router(jobs: list[Job], suffix: str) -> Iterable[Job]:
    sparse = {job.name.split(".")[2] for job in jobs if job.name.endswith(_ROUTER)}
    return (job for job in jobs if job.name.endswith(suffix) and job.name.split(".")[2] in sparse)


def first_and_others(job: Job) -> list[Part]:
    """The inputs of a tensor, the base or else the first model at the beginning."""
    return job.models if job.base is None else [job.base, *job.models]


def _whole(source: Source, name: str) -> Tensor:
    return source.read(name, 0, source.rows(name)).float()
