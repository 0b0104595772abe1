"""Plans of whole runs, and the mesh that is picked where the config's does not fit."""

import re
from pathlib import Path

import pytest

from tests.planning.plan_configs import config_of, plan_of
from trinity.config import load_config
from trinity.errors import UserError
from trinity.hardware import GPUS
from trinity.parallel.mesh import mesh_words, meshes
from trinity.planning import advice
from trinity.planning.mesh_search import with_mesh
from trinity.planning.plan import USABLE_SHARE, make_plan
from trinity.planning.tables import as_text, as_values

ROOT = Path(__file__).parents[2]


def test_default_number_of_gpus() -> None:
    """The product of the fixed sizes."""
    assert make_plan(config_of("parallel.shard=2", "parallel.replicate=-1")).gpus == 2
    assert make_plan(config_of()).gpus == 1


def test_length_of_nano_on_one_gpu() -> None:
    """38,147 steps of 524,288 tokens; 75.1 GB of state; it fits in 141 GB."""
    plan = plan_of("nano_1gpu", 1, "h200")
    assert sum(plan.state.values()) / 1e9 == pytest.approx(75.1, abs=0.05)
    assert "38,147" in as_text(plan)
    assert advice.warnings(plan) == []


@pytest.mark.parametrize(("gpus", "advised"), [(7, "4 or 8"), (3, "2 or 4"), (5000, "4096")])
def test_refused_gpu_count_names_the_nearest(gpus: int, advised: str) -> None:
    """The nearest counts that divide batches and streams come first, although nano's own mesh needs 128 GPUs."""
    config = load_config(ROOT / "configs/nano.yaml")
    with pytest.raises(UserError) as refused:
        make_plan(config, gpus, "h100", pick=True)
    reason = f"batch.sequences=4096 does not divide by {gpus} data ranks"
    assert str(refused.value).startswith(f"{reason}; use --gpus {advised}, or with {gpus} GPUs batch.sequences=")


def test_reason_for_a_picked_mesh() -> None:
    """The plan says why the mesh of the config was refused."""
    plan = make_plan(config_of("parallel.shard=4", "parallel.expert=3"), 4, pick=True)
    reason = "parallel.expert=3 does not divide shard × context = 4"
    assert as_values(plan)["refusal"] == reason
    assert f"mesh picked    {reason}; planned with: {' '.join(plan.picked)}\n" in as_text(plan)


@pytest.mark.parametrize(
    ("name", "gpus", "gpu", "short"),
    [
        ("nano", 64, "h100", 1.0),
        ("mini", 16, "b200", 0.3),
        *(
            pytest.param(name, *gpus, short, marks=pytest.mark.slow)
            for name in ("nano", "mini", "large")
            for gpus in ((64, "h100"), (8, "h200"), (16, "b200"))
            for short in (1.0, 0.3)
        ),
    ],
)
def test_picked_mesh(name: str, gpus: int, gpu: str, short: float) -> None:
    """Two layers of the report's models, whose mesh needs 128 GPUs; also on GPUs with 0.3 of the memory they need.

    With the printed settings on the command line the run passes its checks, and its plan equals the printed one.
    """
    words = ["model.layers=2", "model.dense_layers=1", "model.vocab_size=4096", "batch.ramp=[]"]
    path = ROOT / f"configs/{name}.yaml"
    config = load_config(path, words)
    with pytest.raises(UserError, match=f"does not make {gpus} processes; use ") as refused:
        make_plan(config, gpus, gpu)
    reason = str(refused.value).partition("; use ")[0]
    card = GPUS[gpu]
    plan = make_plan(config, gpus, card, pick=True)
    if short < 1:
        card = card._replace(memory=short * plan.memory.total / USABLE_SHARE)
        plan = make_plan(config, gpus, card, pick=True)
    text = as_text(plan)
    assert f"mesh picked    {reason}; planned with: {' '.join(plan.picked)}\n" in text
    again = make_plan(load_config(path, [*words, *plan.picked]), gpus, card)
    assert (again.sizes, again.memory, again.total_seconds) == (plan.sizes, plan.memory, plan.total_seconds)
    advice = re.findall(r"; (.*) would, with ([\d.]+) GB", text)
    assert len(advice) == (not plan.fits)
    for advised, needed in advice:
        more = int((re.findall(r"--gpus (\d+)", advised) or [gpus])[0])
        settings = [word.removesuffix(")") for word in advised.split() if "=" in word]
        mended = make_plan(load_config(path, [*words, *settings]), more, card)
        assert mended.fits
        assert f"{mended.memory.total / 1e9:.1f}" == needed


def test_fastest_mesh_that_fits_is_picked() -> None:
    """The fastest of all meshes with experts unsplit or fully split; if only the smallest fits, that one."""
    config = config_of("parallel.shard=16")
    plan = make_plan(config, 4, pick=True)
    candidates = [mesh for mesh in meshes(config.model, 4) if mesh[2] in (1, mesh[1])]
    plans = [make_plan(with_mesh(config, mesh_words(config.parallel, *mesh)), 4) for mesh in candidates]
    assert plan.total_seconds == min(candidate.total_seconds for candidate in plans)
    sizes = sorted({candidate.memory.total for candidate in plans})
    tight = plan.card._replace(memory=(sizes[0] + sizes[1]) / 2 / USABLE_SHARE)
    assert make_plan(config, 4, tight, pick=True).memory.total == sizes[0]
