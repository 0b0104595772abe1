"""DAM on any mesh equals one process, in float64: loss, penalties, the gradient of every coefficient, and two updates.

BOUND is relative to the largest value: sums over ranks in another order round by 1e-15, through five layers. AdamW
divides by the gradient's size, so its first steps amplify that where a gradient is nearly 0: here ε is 1e-4.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.dam.conftest import ALL, SETTINGS, write_text
from tests.merging.conftest import child, tokenizer  # noqa: F401 (a fixture)
from trinity.dam.coefficients import gather_coefficients
from trinity.dam.config import read_config
from trinity.dam.load import build_merged_model, load_models, sources_of
from trinity.dam.run import adaptive_merge, prepare
from trinity.dam.step import Learner
from trinity.interop import export_hf
from trinity.interop.tensors import gather_part
from trinity.parallel import mesh

ROOT = Path(__file__).parents[2]
BOUND = 1e-11
MESHES = {
    "shard 2 × expert 2": (4, {"shard": 4, "expert": 2}),
    "replicate 2 × shard 2, expert 2": (4, {"replicate": 2, "shard": 2, "expert": 2}),
}


def learn(content: dict, parallel: dict) -> dict[str, Any]:
    """On rank 0: figures and gradients of the first step, and the coefficients after two; every rank calls it."""
    config = read_config(content | {"parallel": parallel})
    prepared = prepare(config, "out")
    ranks = mesh.start(config.parallel, prepared.plan.donor.config, 1, False)
    model = build_merged_model(prepared.plan, config, ranks)
    load_models(model, sources_of(prepared.plan, config))
    learner = Learner(model, config, ranks)
    learner.optimizer.param_groups[0]["eps"] = 1e-4
    batches = [{n: rows.of_step(k, config.sequences) for n, rows in prepared.texts.items()} for k in range(2)]
    distances, penalties = learner.gradients(batches[0])
    gradients = {name: gather_part(each.grad, ()) for name, each in learner.learned.items()}
    learner.optimizer.zero_grad()
    records = [learner.step(batch) for batch in batches]
    return {
        "distances": distances,
        "penalty": penalties,
        "gradients": gradients,
        "records": records,
        "coefficients": gather_coefficients(model),
    }


def close(found: Any, expected: Any, bound: float = BOUND) -> None:
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    assert (found - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("granularity", ["column", "group"])
def test_mesh_equals_one_process(
    tokenizer: Path,  # noqa: F811
    processes: Callable,
    tmp_path: Path,
    granularity: str,
) -> None:
    """Losses, norms, gradients and updates; with penalties of every kind, and recompute on the meshes."""
    models = []
    for seed, name in enumerate("ab", 1):
        export_hf(child(seed, experts=4), tmp_path / name, tokenizer, torch.float32)
        models.append({"model": str(tmp_path / name), "text": write_text(tmp_path / f"{name}.txt", seed)})
    content = SETTINGS | {
        "models": models, "compute": "float64", "learn": ALL, "granularity": granularity, "clip": 0.01,
        "l1": 0.02, "l2": 0.03, "overlap": 0.05, "microbatch": 1,
    }  # fmt: skip
    try:
        expected = learn(content | {"microbatch": 4}, {})
    finally:
        mesh.stop()
    for world, parallel in MESHES.values():
        found = processes(world).run(learn, content | {"recompute": True}, parallel)[0]
        assert found["distances"].keys() == expected["distances"].keys()
        close(list(found["distances"].values()), list(expected["distances"].values()))
        close(found["penalty"], expected["penalty"])
        assert found["gradients"].keys() == expected["gradients"].keys()
        largest = max(float(each.abs().max()) for each in expected["gradients"].values())
        for name, gradient in expected["gradients"].items():
            assert gradient.abs().max() > 0, name
            assert (found["gradients"][name] - gradient).abs().max() <= BOUND * largest, name
        for one, other in zip(found["records"], expected["records"]):
            assert other["grad_norm"] > 0.01  # clipped
            close(one["grad_norm"], other["grad_norm"])
            close(one["loss"], other["loss"])
        for name, value in expected["coefficients"].items():
            # gathered in fp32: one unit in the last place
            assert (found["coefficients"][name] - value).abs().max() <= 1e-7, name


@pytest.mark.slow  # two starts of four processes
@pytest.mark.parametrize("names", ["ab", ("a", "b", "base")], ids=["without the base", "with the base"])
def test_torchrun_equals_one_process(tokenizer: Path, tmp_path: Path, names: Sequence[str]) -> None:  # noqa: F811
    """The command itself: a rank is killed half-way, the same command goes on; metrics, weights and coefficients.

    AdamW amplifies the rounding of sums where a gradient is nearly 0, over eight steps to 1e-9 at most. The result is
    stored in fp32: a unit in the last place.
    """
    for seed, name in enumerate(("base", "a", "b")):
        export_hf(child(seed, experts=4), tmp_path / name, tokenizer, torch.float32)
    texts = [write_text(tmp_path / f"{each}.txt", seed) for seed, each in enumerate(names)]
    models = [{"model": str(tmp_path / each), "text": text} for each, text in zip(names, texts)]
    content = SETTINGS | {
        "models": models, "base_model": str(tmp_path / "base"), "compute": "float64", "learn": ALL, "rows": 32,
        "microbatch": 1, "save_every": 1,
    }  # fmt: skip
    one, four, config = tmp_path / "one", tmp_path / "four", tmp_path / "dam.yaml"
    assert adaptive_merge(read_config(content), one) == 0
    mesh.stop()
    config.write_text(yaml.safe_dump(content | {"parallel": MESHES["shard 2 × expert 2"][1]}))
    killed = torchrun(config, four)
    while not (tmp_path / ".four.dam/checkpoints/step_00000001/COMPLETE").exists():
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.01)
    ranks = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    os.kill(next(int(pid) for pid in ranks if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()), signal.SIGKILL)
    killed.communicate()
    assert killed.returncode != 0
    assert not four.exists()
    resumed = torchrun(config, four)
    errors = resumed.communicate()[1]
    assert resumed.returncode == 0, errors
    lines = [[json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()] for each in (one, four)]
    assert [line["step"] for line in lines[1]] == list(range(1, 9))
    for expected, found in zip(*lines, strict=True):
        assert found.pop("distance") == pytest.approx(expected.pop("distance"), rel=1e-9)
        assert found == pytest.approx(expected, rel=1e-9)
    for path in one.glob("*.safetensors"):
        expected, found = load_file(path), load_file(four / path.name)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=2**-22, atol=1e-7, msg=f"{path.name}: {name}")


def torchrun(config: Path, out: Path) -> subprocess.Popen:
    """Start tools/dam.py in four processes, as a user does."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "tools/dam.py", config, out]
    return subprocess.Popen([sys.executable, *map(str, words)], stderr=subprocess.PIPE, text=True, cwd=ROOT)
