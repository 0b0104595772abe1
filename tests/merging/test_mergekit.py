"""The same numbers as mergekit 0.1.5 from the same YAML, where it is installed.

MERGEKIT_PYTHON names a Python with mergekit and torch. It runs in a process of its own, as a program. Differences by
rule: here gains, expert_bias and routers are merged smoothly in fp32, so the recipes for this side have a rule that
merges every tensor by the method; arcee_fusion's divergence is computed without cancellation; random methods draw other
numbers, so they are compared at density 1.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from tests.merging.conftest import tensors_of
from trinity.merging import merge

PYTHON = os.environ.get("MERGEKIT_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="set MERGEKIT_PYTHON to a Python that has mergekit 0.1.5"),
]
RUNNER = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for name, recipe in yaml.safe_load(open(sys.argv[1])).items():
    options = MergeOptions(quiet=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(recipe), f"{sys.argv[2]}/{name}", options=options)
"""


def case(
    method: str, weights: tuple = (0.5, 0.3, 0.4), base: bool = True, whole: dict | None = None, **each: object
) -> dict:
    """A recipe; `each` holds parameters of the models, one value or one for each."""
    entries = []
    for number, name in enumerate("abc"[: len(weights)]):
        own = {key: value[number] if isinstance(value, tuple) else value for key, value in each.items()}
        entries.append({"model": name, "parameters": {"weight": weights[number]} | own})
    content = {"merge_method": method, "models": entries, "parameters": whole or {}, "dtype": "float32"}
    return content | ({"base_model": "base"} if base else {})


def unweighted(method: str, count: int = 3, base: bool = True, add_base: bool = False, **whole: object) -> dict:
    """A recipe for a method without weights."""
    content = case(method, (1,) * count, base, whole)
    for entry in content["models"]:
        del entry["parameters"]
    content["models"] += [{"model": "base"}] * add_base
    return content


def stacked() -> dict:
    """Two slices with gradients and filters; the second one has its own parameters."""

    def sources(layers: list[int]) -> list[dict]:
        return [
            {"model": name, "layer_range": layers, "parameters": {"weight": w}}
            for name, w in (("a", 0.5), ("b", [0.2, 1]))
        ]

    filters = [{"filter": "self_attn", "value": 0.3}, {"filter": "mlp.experts", "value": [0.2, 0.9]}, {"value": 0.6}]
    return {
        "merge_method": "ties", "base_model": "base", "dtype": "float32",
        "parameters": {"density": filters, "lambda": 0.9},
        "slices": [
            {"sources": [*sources([0, 4]), {"model": "base", "layer_range": [0, 4]}]},
            {"sources": [*sources([4, 5]), {"model": "base", "layer_range": [4, 5]}],
             "parameters": {"normalize": False}},
        ],
    }  # fmt: skip


EQUAL = {
    "linear": case("linear", base=False),
    "linear_sum": case("linear", base=False, whole={"normalize": False}),
    "linear_gradient": case("linear", ([0.1, 0.9], [1, 0.5, 0.7], 0.2), base=False),
    "slerp": unweighted("slerp", 1, add_base=True, t=0.3),
    "nuslerp": case("nuslerp", (0.5, 0.3), base=False),
    "nuslerp_base": case("nuslerp", (0.5, 0.3)),
    "nuslerp_rows": case("nuslerp", (0.5, 0.3), False, {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "nuslerp_columns": case("nuslerp", (0.5, 0.3), False, {"nuslerp_flatten": False}),
    "multislerp": case("multislerp", base=False),
    "multislerp_base": case("multislerp"),
    "multislerp_sum": case("multislerp", base=False, whole={"normalize_weights": False}),
    "karcher": unweighted("karcher", base=False),
    "task_arithmetic": case("task_arithmetic", (0.5, -0.3, 0.4), whole={"lambda": 0.7}),
    "task_arithmetic_mean": case("task_arithmetic", whole={"lambda": 0.7, "normalize": True}),
    "ties": case("ties", density=(0.5, 0.3, 0.7)),
    "ties_negative": case("ties", (0.5, -0.3, 0.4), density=0.5),
    "ties_sum": case("ties", density=0.5, whole={"normalize": False, "lambda": 1.3}),
    "ties_slices": stacked(),
    "dare_linear": case("dare_linear", density=1.0),
    "dare_ties": case("dare_ties", density=1.0),
    "dare_ties_mean": case("dare_ties", density=1.0, whole={"normalize": True}),
    "breadcrumbs": case("breadcrumbs", density=0.5, gamma=0.1),
    "breadcrumbs_full": case("breadcrumbs", density=0.95, gamma=0.1),
    "breadcrumbs_ties": case("breadcrumbs_ties", density=0.5, gamma=0.1),
    "sce": unweighted("sce"),
    "sce_half": unweighted("sce", select_topk=0.5),
    "model_stock": unweighted("model_stock"),
    "model_stock_rows": unweighted("model_stock", filter_wise=True),
    "nearswap": unweighted("nearswap", 1, add_base=True, t=0.001),
    "ram": unweighted("ram"),
    "ramplus_tl": unweighted("ramplus_tl", r=0.5, alpha=5.0, epsilon=1e-3),
    "passthrough": {"merge_method": "passthrough", "dtype": "float32",
                    "models": [{"model": "a", "parameters": {"scale": 0.5}}]},
}  # fmt: skip
OTHER = {"arcee_fusion": unweighted("arcee_fusion", 1, add_base=True)}
BF16 = {f"{name}_bf16": EQUAL[name] | {"out_dtype": "bfloat16"} for name in ("linear", "ties", "slerp", "model_stock")}


@pytest.fixture(scope="module")
def by_mergekit(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each case, made in one process."""
    out = tmp_path_factory.mktemp("mergekit")
    (out / "cases.yaml").write_text(yaml.safe_dump(EQUAL | OTHER | BF16))
    (out / "runner.py").write_text(RUNNER)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    words = [PYTHON, out / "runner.py", out / "cases.yaml", out]
    done = subprocess.run(words, cwd=originals, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def merged_here(content: dict, folder: Path) -> dict[str, torch.Tensor]:
    """The same recipe, with every tensor by its method."""
    rule = {"match": ".", "method": content["merge_method"]}
    plain = content["merge_method"] == "passthrough"
    merge(content if plain else content | {"rules": [rule]}, folder)
    return tensors_of(folder)


@pytest.mark.parametrize("name", EQUAL)
def test_fp32(name: str, by_mergekit: Path, originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1e-6 of the tensor's largest value: both round to fp32, in sums of another order."""
    monkeypatch.chdir(originals)
    expected, found = tensors_of(by_mergekit / name), merged_here(EQUAL[name], tmp_path / "out")
    assert expected.keys() == found.keys()
    for tensor, values in expected.items():
        bound = 1e-6 * values.abs().max().item()
        torch.testing.assert_close(
            found[tensor], values, rtol=0, atol=bound, msg=lambda text, at=tensor: f"{at}: {text}"
        )


@pytest.mark.parametrize("name", BF16)
def test_bf16(name: str, by_mergekit: Path, originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One unit in the last place: the fp32 values before rounding differ by 1e-6 of the largest at most."""
    monkeypatch.chdir(originals)
    expected, found = tensors_of(by_mergekit / name), merged_here(BF16[name], tmp_path / "out")
    for tensor, values in expected.items():
        apart = (found[tensor].bfloat16().view(torch.int16).int() - values.bfloat16().view(torch.int16).int()).abs()
        near_zero = values.float().abs() < 1e-5 * values.float().abs().max()
        assert int(apart[~near_zero].max()) <= 1, tensor


def test_arcee_fusion(by_mergekit: Path, originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the two differ, the other model's value was taken: a choice that hung on digits that fp32 has lost."""
    monkeypatch.chdir(originals)
    expected, found = tensors_of(by_mergekit / "arcee_fusion"), merged_here(OTHER["arcee_fusion"], tmp_path / "out")
    a, base = tensors_of(originals / "a"), tensors_of(originals / "base")
    different = total = 0
    for tensor, values in expected.items():
        where = found[tensor] != values
        assert bool(((found[tensor] == a[tensor]) | (found[tensor] == base[tensor])).all())
        different, total = different + int(where.sum()), total + where.numel()
    assert different < 0.03 * total
