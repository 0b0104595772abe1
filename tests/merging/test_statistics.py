"""What differs between models, against the same in float64 from whole tensors."""

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.interop.small_model import CONFIG
from tests.merging.conftest import child, fuse, recipe, rewrite, tensors_of
from tests.merging.test_sources import make_run
from trinity.merging import merge
from trinity.merging.inputs import Inputs
from trinity.merging.load_model import load_model
from trinity.merging.merge_models import Merger
from trinity.merging.open_source import open_source
from trinity.merging.plan import make_plan
from trinity.merging.recipe import read_recipe
from trinity.merging.sources import FolderSource
from trinity.merging.statistics import MERGED, PARTS, Statistics, _sums, compare, place_of


def statistics(content: dict, out: Path) -> Statistics:
    """Merge, and compare."""
    merge(content, out)
    plan = make_plan(read_recipe(content))
    return compare(plan, Merger(plan, out).reader, FolderSource("out", out))


def flat(folder: Path, names: list[str]) -> np.ndarray:
    tensors = tensors_of(folder)
    return np.concatenate([tensors[name].double().numpy().ravel() for name in names])


@pytest.mark.parametrize("base", [True, False])
def test_every_layer_and_part(family: Path, base: bool) -> None:
    """Norms, cosines and conflicts of every (layer, part) and expert; without a base, from the first model."""
    content = recipe("ties" if base else "linear", "abc", base)
    found = statistics(content, family / "out")
    reference, models = ("base", ["a", "b", "c"]) if base else ("a", ["b", "c"])
    assert (found.reference, found.models) == (reference, models)
    names: dict[tuple, list[str]] = {}
    for name in tensors_of(family / "base"):
        layer, part, expert = place_of(name)
        names.setdefault((layer, part), []).append(name)
        if expert is not None:
            names.setdefault((layer, expert), []).append(name)
    groups = found.by_part() | found.by_expert()
    assert groups.keys() == names.keys()
    for key, sums in groups.items():
        origin = flat(family / reference, names[key])
        folders = dict.fromkeys(models, None) | {MERGED: "out"}
        deltas = {label: flat(family / (folder or label), names[key]) - origin for label, folder in folders.items()}
        assert sums.elements == origin.size
        for label, delta in deltas.items():
            number = found.vectors[label]
            expected = np.linalg.norm(delta) / np.linalg.norm(origin)
            assert sums.relative_norm(number) == pytest.approx(expected, rel=1e-12)  # sums in another order
            weights = origin + delta
            cosine = origin @ weights / np.linalg.norm(origin) / np.linalg.norm(weights)
            assert sums.weight_cosine(number, 0) == pytest.approx(cosine, rel=1e-12)
        for (a, first), (b, second) in combinations(deltas.items(), 2):
            cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
            assert sums.cosine(found.vectors[a], found.vectors[b]) == pytest.approx(cosine, abs=1e-12)
        signs = np.sign([deltas[label] for label in models])
        changed, conflicts = (signs != 0).any(0).sum(), ((signs > 0).any(0) & (signs < 0).any(0)).sum()
        assert sums.conflict_share == pytest.approx(conflicts / changed)
    total = found.total(lambda place: True)
    assert total.elements == sum(tensor.numel() for tensor in tensors_of(family / "base").values())


def test_every_tensor_has_a_place(family: Path) -> None:
    """Each part of the list is used, and gains alone are norms."""
    places = {name: place_of(name) for name in tensors_of(family / "base")}
    in_layers = {place.part for place in places.values() if place.layer is not None}
    assert in_layers == set(PARTS)
    norms = [name for name, place in places.items() if place.part == "norms"]
    assert all("norm" in name for name in norms)
    assert len(norms) == CONFIG.layers * 6


def test_blocks_do_not_matter() -> None:
    """A matrix read in blocks of one row gives the sums of the whole."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(9, 7, generator=generator) for _ in range(4)]
    readers = [lambda start, stop, tensor=tensor: tensor[start:stop] for tensor in tensors]
    whole, rows = (
        _sums(Inputs((9, 7), readers[0], readers[1:], block=block), [0, 1, 2, 3], 4) for block in (1 << 20, 7)
    )
    torch.testing.assert_close(rows.gram_VV, whole.gram_VV, rtol=1e-14, atol=1e-14)  # sums in another order
    assert (rows.elements, rows.changed, rows.conflicts) == (whole.elements, whole.changed, whole.conflicts)


def test_a_base_without_weights_is_the_reference(family: Path) -> None:
    assert statistics(recipe("linear", "ab", True), family / "out").reference == "base"


def test_slices_and_matched_experts(family: Path) -> None:
    """Layers stacked from one model do not differ from it; permuted experts are compared in the first model's order."""
    part = [{"model": "a", "layer_range": [0, 5]}]
    found = statistics({"merge_method": "passthrough", "slices": [{"sources": part}]}, family / "stacked")
    assert found.models == []
    assert found.total(lambda place: True).relative_norm(1) == 0

    order = torch.tensor([3, 1, 5, 0, 2, 4])

    def permute(tensors: dict) -> None:
        for layer in range(2, 5):
            prefix = f"model.layers.{layer}.mlp"
            for name in ("router.gate.weight", "expert_bias"):
                tensors[f"{prefix}.{name}"] = tensors[f"{prefix}.{name}"][order]
            for kind in ("gate", "up", "down"):
                old = [tensors[f"{prefix}.experts.{e}.{kind}_proj.weight"] for e in range(6)]
                for expert, source in enumerate(order.tolist()):
                    tensors[f"{prefix}.experts.{expert}.{kind}_proj.weight"] = old[source]

    before = statistics(recipe("linear", "ab"), family / "plain")
    rewrite(family / "b", permute)
    after = statistics(recipe("linear", "ab", match_experts=True), family / "matched")
    for place, sums in before.sums.items():
        assert after.sums[place].relative_norm(1) == pytest.approx(sums.relative_norm(1), rel=1e-6, nan_ok=True)


def test_nan_where_nothing_differs(family: Path) -> None:
    sums = statistics({"merge_method": "passthrough", "models": [{"model": "a"}]}, family / "out").total(lambda _: True)
    assert math.isnan(sums.cosine(1, 1))
    assert math.isnan(sums.conflict_share)


def test_models_of_sources(family: Path, tmp_path: Path, tokenizer: Path) -> None:
    """A folder with stacked experts, and the checkpoint of a run, as models: bit for bit those that were saved."""
    rewrite(family / "a", fuse)
    sources = {1: open_source("a"), 4: open_source(f"{make_run(tmp_path / 'run', tokenizer)}@4")}
    for seed, source in sources.items():
        expected = child(seed).state_dict()
        for name, tensor in load_model(source).state_dict().items():
            assert torch.equal(tensor, torch.zeros_like(tensor) if name.endswith("momentum") else expected[name]), name
