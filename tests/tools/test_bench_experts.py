"""The suite `experts` without timing: routings, FLOP counts, goals, tables, and agreement of the contenders."""

import pytest
import torch
from benchmarks import experts
from benchmarks.experts import Case, balanced_routing, flops, goals, make_inputs, zipf_routing
from torch import Tensor

from trinity.config.model import ZOO
from trinity.models.flops import flops_per_token


def counts(indices_TK: Tensor, experts: int) -> Tensor:
    return torch.bincount(indices_TK.flatten(), minlength=experts)


@pytest.mark.parametrize(("T", "E", "K"), [(64, 16, 4), (33, 7, 3), (5, 8, 8), (1, 4, 1)])
@pytest.mark.parametrize("routing", [balanced_routing, zipf_routing])
def test_a_tokens_experts_are_distinct(routing, T: int, E: int, K: int) -> None:
    indices_TK = routing(T, E, K)
    assert indices_TK.shape == (T, K)
    assert all(len(set(row)) == K for row in indices_TK.tolist())
    assert indices_TK.min() >= 0
    assert indices_TK.max() < E
    assert torch.equal(indices_TK, routing(T, E, K))


def test_balanced_is_balanced() -> None:
    """The report's sizes divide: every expert has exactly T·K/E; else they differ by one. Neighbours are shuffled."""
    assert counts(balanced_routing(4096, 128, 8), 128).eq(256).all()
    uneven = counts(balanced_routing(33, 7, 3), 7)
    assert uneven.max() - uneven.min() == 1
    assert (balanced_routing(4096, 128, 8).diff(dim=1) == 1).double().mean() < 0.1


def test_zipf_is_drawn_by_its_weights() -> None:
    """One draw a token: frequencies i^−s/Σ within five standard deviations; and the fullest of 128 with 8 draws."""
    E, T, s = 8, 40_000, 0.5
    weights = torch.arange(1, E + 1).double().pow(-s)
    expected = T * weights / weights.sum()
    frequencies = counts(zipf_routing(T, E, 1, s), E).sort(descending=True).values
    assert ((frequencies - expected).abs() < 5 * expected.sqrt()).all(), (frequencies, expected)
    load = counts(zipf_routing(8192, 128, 8), 128).double()
    assert 3.5 < load.max() / load.mean() < 5.5


def test_flops_are_those_of_the_model() -> None:
    """Nano's routed experts by flops_per_token, which counts parameters; backward is twice forward."""
    nano, case = ZOO["nano"], experts.CUDA_CASES["Nano"]
    forward, backward = flops(case)
    assert forward * case.layers == case.T * flops_per_token(nano, 4096)["routed experts"]
    assert backward == 2 * forward


@pytest.mark.parametrize("name", ["Nano", "Mini", "Large, 2048 tokens an expert", "Large, 512 tokens an expert"])
def test_cases_are_the_models(name: str) -> None:
    case, model = experts.CUDA_CASES[name], ZOO[name.split(",")[0].lower()]
    assert case[:4] == (model.width, model.expert_width, model.experts, model.active_experts)
    assert case.layers == model.moe_layers
    if "tokens an expert" in name:
        assert int(name.split()[1]) == case.T * case.K // case.E


def test_the_smoke_case_is_the_zoo_model() -> None:
    case, model = experts.CPU_CASES["smoke"], ZOO["smoke"]
    assert case[:4] == (model.width, model.expert_width, model.experts, model.active_experts)
    assert case.layers == model.moe_layers


def results(on: str, tf: list[float], kept_mib: float) -> dict:
    trinity = {"seconds": [0.1, 0.2], "tf": tf, "tf_both": sum(tf) / 2, "kept_mib": kept_mib}
    peer = {"seconds": [0.01, 0.02], "tf": [900, 900], "tf_both": 900, "kept_mib": 1}
    contenders = {
        "trinity triton": trinity, "trinity reference": {"failed": "out of memory"},
        "trinity's engine grouped_mm": peer, "transformers eager": {"failed": "no"},
    }  # fmt: skip
    case = {"sizes": experts.CUDA_CASES["Nano"]._asdict(), "fullest": 1.0, "contenders": contenders}
    result = {"on": on, "unit": "TF", "zipf": 0.5, "cases": {"Nano, balanced": case}}
    return result | {"goals": goals(result)}


def test_goals() -> None:
    """Met by Trinity's kernels on an H200 alone, not by a peer.

    322 MiB × 54 layers are 16.98 GiB, 323 are 17.03.
    """
    verdicts = results("NVIDIA H200", [400, 430], 322)["goals"]
    assert verdicts["Nano forward ≥ 400 TF"] == "met (400)"
    assert verdicts["Nano backward ≥ 420 TF"] == "met (430)"
    assert verdicts["Nano activations ≤ 17 GiB"] == "met (17)"
    assert verdicts["Mini forward ≥ 520 TF"] == "not measured"
    missed = results("NVIDIA H200", [399, 419], 323)["goals"]
    assert [missed[goal].split()[0] for goal in list(verdicts)[:2]] == ["missed"] * 2
    assert missed["Nano activations ≤ 17 GiB"].startswith("missed")
    assert set(results("NVIDIA H100 80GB HBM3", [900, 900], 1)["goals"].values()) == {"not measured"}


def test_table() -> None:
    """Every row has as many cells as the header; a failure is one cell."""
    lines = experts.table(results("NVIDIA H200", [394.5, 430], 322)).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in rows} == {10}
    assert "| trinity triton | 100.00 | 394 | 200.00 | 430 | 412 | 52.2% | 322 | 17.0 |" in rows
    assert any("out of memory" in row for row in rows)
    assert "the fullest expert has 1.0 times the mean" in "\n".join(lines)
    assert "Nano forward ≥ 400 TF: missed (394)" in lines[-1]


def test_contenders_agree_or_give_a_reason() -> None:
    """The suite on a tiny layer: a contender that disagrees with the reference is reported as failed."""
    case = {"contenders": {}}
    experts._measure(case, Case(16, 8, 4, 2, 24, 1), "Zipf", rounds=1)
    contenders = case["contenders"]
    measured = {name for name, row in contenders.items() if "failed" not in row}
    assert {
        "trinity reference",
        "trinity's engine grouped_mm",
        "transformers eager",
        "transformers grouped_mm",
    } <= measured
    assert all(len(contenders[name]["tf"]) == 2 and min(contenders[name]["seconds"]) > 0 for name in measured)
    if not torch.cuda.is_available():
        assert contenders["SonicMoE"]["failed"] == "needs a GPU"


def test_a_broken_device_gives_failed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """If even the inputs cannot be created, each case has one failed row; goals and table are complete."""

    def broken(*_: object) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(experts, "make_inputs", broken)
    output = experts.run(quick=True)
    assert all("illegal" in case["contenders"]["the rest"]["failed"] for case in output["cases"].values())
    assert "| the rest | RuntimeError: an illegal memory access |" in experts.table(output)


def test_a_contender_with_wrong_results_fails() -> None:
    inputs = make_inputs(Case(16, 8, 4, 2, 24, 1), "balanced")
    right = experts.Inputs(*inputs).x_TD.detach() + 1
    with pytest.raises(ValueError, match="computes something else"):
        experts._check(lambda inputs: inputs.x_TD * 1.0, inputs, right)
