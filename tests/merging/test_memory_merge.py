"""Merges in memory against the folders that tools/merge.py writes: the same bits, for every kind of method."""

from pathlib import Path

import pytest
import torch

from tests.merging.conftest import child, recipe
from tests.merging.test_sources import make_run
from trinity.interop import export_hf, load_hf
from trinity.merging import merge
from trinity.merging.memory_merge import HeldSource, MemoryMerge
from trinity.merging.plan import make_plan, plan_jobs
from trinity.merging.recipe import read_recipe
from trinity.merging.validation import PackedText, RowSettings, ValidationSets, measure
from trinity.models import Trinity

RECIPES = {
    "linear": recipe("linear", "abc"),
    "bfloat16": recipe("task_arithmetic", "ab", True, out_dtype="bfloat16", parameters={"lambda": 0.9}),
    "ties": recipe("ties", "ab", True, out_dtype="bfloat16", parameters={"density": 0.5}),
    "dare_ties": recipe("dare_ties", "ab", True, parameters={"density": 0.4}, seed=3),
    "slerp": {"merge_method": "slerp", "base_model": "base", "models": [{"model": "a"}], "parameters": {"t": 0.3}},
    "nuslerp": recipe("nuslerp", "ab", out_dtype="float16"),
    "slices": {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": "a", "layer_range": [0, 4]}]},
                   {"sources": [{"model": "b", "layer_range": [4, 5]}]}],
    },
    "rules": recipe("linear", "ab", rules=[{"match": "router", "method": "passthrough", "model": "b"}]),
}  # fmt: skip


def assert_equal(model: Trinity, folder: Path) -> None:
    """All parameters and buffers, to the last bit."""
    expected = load_hf(folder).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("name", RECIPES)
def test_equals_the_folder(family: Path, name: str) -> None:
    merge(RECIPES[name], family / "out")
    memory = MemoryMerge(plan := make_plan(read_recipe(RECIPES[name])))
    memory.merge(plan.jobs)
    assert_equal(memory.model, family / "out")


def test_after_other_parameters(family: Path) -> None:
    """The model keeps nothing of the merge before; only tensors whose parameters changed are merged, by threads too."""
    filters = [{"filter": "self_attn", "value": 0.9}, {"filter": "*", "value": 0.2}]
    first, second = (recipe("ties", "ab", True, parameters={"lambda": value}) for value in (0.2, filters))
    memory = MemoryMerge(plan := make_plan(read_recipe(first)), workers=2)
    memory.merge(plan.jobs)
    assert memory.merged == len(plan.jobs)
    memory.merge(plan_jobs(plan, read_recipe(second)))
    assert memory.merged - len(plan.jobs) == sum("self_attn" in job.name for job in plan.jobs)
    merge(second, family / "out")
    assert_equal(memory.model, family / "out")


def test_matched_experts_and_runs(family: Path, tokenizer: Path) -> None:
    """Orders of experts and checkpoints of runs are kept in memory, and change nothing."""
    model = child(1)
    for block in model.blocks[2:]:
        order = torch.randperm(6, generator=torch.Generator().manual_seed(5))
        for tensor in (
            block.ffn.router.weight,
            block.ffn.expert_bias,
            block.ffn.experts.gate_up,
            block.ffn.experts.down,
        ):
            tensor.data = tensor.data[order]
    export_hf(model, family / "permuted", tokenizer, torch.float32)
    content = {
        "merge_method": "task_arithmetic", "base_model": "base", "match_experts": True,
        "models": [{"model": "permuted", "parameters": {"weight": 0.5}}],
    }  # fmt: skip
    merge(content, family / "out")
    memory = MemoryMerge(plan := make_plan(read_recipe(content)))
    memory.merge(plan.jobs)
    assert_equal(memory.model, family / "out")

    run = make_run(family / "run", tokenizer)
    models = [{"model": f"{run}@{step}", "parameters": {"weight": weight}} for step, weight in ((4, 0.3), (8, 0.7))]
    content = {"merge_method": "linear", "out_dtype": "float32", "models": models}
    merge(content, family / "average")
    memory = MemoryMerge(plan := make_plan(read_recipe(content)))
    assert all(isinstance(each, HeldSource) for each in memory._merger._sources.values())
    memory.merge(plan.jobs)
    assert_equal(memory.model, family / "average")


def test_packed_text_measures_the_same(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows packed once give the figures of `measure`, which packs them each time."""
    monkeypatch.setenv("TRINITY_CACHE", str(family.parent / "cache"))
    (family / "text.txt").write_text("the rain in Spain stays mainly in the plain. " * 40)
    settings = RowSettings(window=32, rows=5, document_mask=True, batch_tokens=64)
    documents = ValidationSets({"text": "text.txt"}).documents("text", family / "base", 300)
    packed = PackedText(documents, family / "base", 32, settings)
    for name in ("base", "a"):
        model = load_hf(family / name)
        expected = measure(model, documents, family / "base", settings).metrics
        assert packed.measure(model) | {"perplexity": expected["perplexity"]} == expected
