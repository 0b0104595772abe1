"""Kernels and number formats that the config names: refused if they cannot run, the same training if they can."""

import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from tests.training.run_files import metrics, train
from trinity.config.load import OmegaConf, build_config
from trinity.config.run import KernelsConfig
from trinity.errors import UserError
from trinity.parallel.mesh import Sizes
from trinity.planning.fake_rank import fake_rank
from trinity.training.build import check_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WITH_TRITON = [field.name for field in fields(KernelsConfig) if "triton" in str(field.type)]


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("name", WITH_TRITON)
def test_triton_needs_a_gpu(name: str, no_interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them, by its name; on a GPU and under the interpreter none is refused."""
    kernels = KernelsConfig(**{name: "triton"})
    with pytest.raises(UserError, match=rf"^kernels\.{name}=triton needs an NVIDIA GPU; use auto or reference$"):
        check_kernels(kernels, CPU)
    check_kernels(kernels, CUDA)
    check_kernels(KernelsConfig(), CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_kernels(kernels, CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_on_the_command_line(
    settings: dict, config_file: Callable, run_command: Callable, no_interpreter: None
) -> None:
    result = run_command("launch/pretrain.py", config_file(settings), "kernels.norms=triton")
    assert result.code == 2, result.errors
    assert result.errors.splitlines()[-1] == "error: kernels.norms=triton needs an NVIDIA GPU; use auto or reference"
    assert "Traceback" not in result.errors


def test_a_plan_is_made_anywhere(settings: dict, no_interpreter: None) -> None:
    """A run on GPUs can be planned on a machine without one."""
    raw = OmegaConf.create(settings | {"kernels": {"norms": "triton", "experts": "megablocks"}})
    raw.precision = {"compute": "bfloat16", "fp8": "transformer_engine"}
    with fake_rank(build_config([("test", raw)]), Sizes(1, 1, 1, 1, "experts")) as plan:
        assert plan.model.embed.weight.is_meta


@pytest.mark.parametrize("name", ["megablocks", "transformer_engine"])
def test_an_engine_whose_package_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        UserError, match=rf"^kernels\.experts={name} cannot be used: .* install it: pip install"
    ) as refused:
        check_kernels(KernelsConfig(experts=name), CUDA)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("kind", "package"), [("torchao", "torchao.float8"), ("transformer_engine",) * 2])
def test_fp8_whose_package_is_missing(settings: dict, kind: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    settings["precision"] = {"compute": "bfloat16", "fp8": kind}
    with pytest.raises(UserError, match=rf"^precision\.fp8={kind} needs .*; install it with pip install .*fp8=none$"):
        train(settings)


def test_grouped_mm_trains_as_the_reference(settings: dict, tmp_path: Path) -> None:
    """Four steps in fp32: only the order of sums differs, and routes are the same. A changed engine may resume."""
    runs = {}
    for engine in ("reference", "grouped_mm"):
        settings["run"]["dir"] = str(tmp_path / engine)
        assert train(settings, "run.steps=4", f"kernels.experts={engine}") == 0
        runs[engine] = metrics(tmp_path / engine)
    for first, second in zip(*runs.values()):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)
        assert first["max_violation"] == second["max_violation"]
    assert train(settings, "run.steps=5", "kernels.experts=reference") == 0
    settings["precision"]["compute"] = "bfloat16"
    with pytest.raises(UserError, match=r"--accept-change precision\.fp8"):
        train(settings, "run.steps=6", "precision.fp8=torchao", accept=("precision.compute",))
