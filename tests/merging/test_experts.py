"""Matching of permuted experts: the assignment with brute force, and a shuffled model merged with itself."""

from itertools import permutations
from pathlib import Path

import pytest
import torch

from tests.interop.small_model import CONFIG
from tests.merging.conftest import child, recipe, rewrite, tensors_of
from trinity.interop import export_hf
from trinity.merging import merge
from trinity.merging.experts import assignment, unrelated_models
from trinity.merging.plan import make_plan
from trinity.merging.recipe import read_recipe


@pytest.mark.parametrize("n", range(1, 8))
def test_assignment_is_the_cheapest(n: int) -> None:
    """Against all n! permutations; with negative and equal costs."""
    generator = torch.Generator().manual_seed(n)
    for cost in (torch.randn(n, n, generator=generator), torch.randint(3, (n, n), generator=generator).double()):
        found = assignment(cost)
        assert sorted(found.tolist()) == list(range(n))
        best = min(sum(cost[i, j].item() for i, j in enumerate(order)) for order in permutations(range(n)))
        assert cost[torch.arange(n), found].sum().item() == pytest.approx(best, abs=1e-5)


def shuffle(tensors: dict) -> None:
    """The same model with its experts, and the neurons within each, in another order."""
    generator = torch.Generator().manual_seed(7)
    for layer in range(CONFIG.dense_layers, CONFIG.layers):
        prefix = f"model.layers.{layer}.mlp"
        order = torch.randperm(CONFIG.experts, generator=generator)
        for name in ("router.gate.weight", "expert_bias"):
            tensors[f"{prefix}.{name}"] = tensors[f"{prefix}.{name}"][order].clone()
        old = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.experts.")}
        for expert in range(CONFIG.experts):
            neurons = torch.randperm(CONFIG.expert_width, generator=generator)
            for name in ("gate", "up", "down"):
                matrix = old[f"{prefix}.experts.{order[expert]}.{name}_proj.weight"]
                matrix = matrix[:, neurons] if name == "down" else matrix[neurons]
                tensors[f"{prefix}.experts.{expert}.{name}_proj.weight"] = matrix.contiguous()


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_shuffled_model(family: Path, method: str) -> None:
    """Merging with the shuffled model is merging with the model; fused layouts and workers too."""
    base = method == "ties"
    merge(recipe(method, base=base), family / "expected")
    rewrite(family / "b", shuffle)
    merged = merge(recipe(method, base=base, match_experts=True), family / "out", workers=2)
    expected, out = tensors_of(family / "expected"), tensors_of(family / "out")
    assert all(torch.equal(out[name], tensor) for name, tensor in expected.items())
    assert merged.dropped == 0
    merge(recipe(method, base=base), family / "wrong")
    assert not torch.equal(
        tensors_of(family / "wrong")["model.layers.2.mlp.expert_bias"], out["model.layers.2.mlp.expert_bias"]
    )


def test_unrelated_models_are_named(family: Path) -> None:
    """Children of one base correlate; a shuffled copy does by its attention alone, another initialisation does not."""
    assert unrelated_models(make_plan(read_recipe(recipe("linear", "abc")))) == []
    rewrite(family / "b", shuffle)
    (note,) = unrelated_models(make_plan(read_recipe(recipe())))
    assert "the routers of a and b correlate by" in note
    assert "attention weights by 1.00" in note
    assert "match_experts: true" in note
    other = child(0)
    other.init_weights(99)
    export_hf(other, family / "c", family / "base", torch.float32, overwrite=True)
    (note,) = unrelated_models(make_plan(read_recipe(recipe("linear", "c", match_experts=True) | {
        "models": [{"model": name, "parameters": {"weight": 1}} for name in "ac"]})))  # fmt: skip
    assert "attention weights by -0.0" in note or "attention weights by 0.0" in note
    assert "their experts are matched first" in note
