"""The plan as a user meets it: the command, its tables and values, and advice that holds."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from trinity.config import load_config
from trinity.config.load import OmegaConf, build_config
from trinity.config.run import RunConfig
from trinity.planning import advice
from trinity.planning.plan import fullest_moment, make_plan
from trinity.planning.text import as_text, as_values, describe
from trinity.training.hardware import GPUS

ROOT = Path(__file__).parents[2]
SMALL = {
    "model": {
        "width": 64,
        "layers": 4,
        "dense_width": 64,
        "experts": 8,
        "active_experts": 2,
        "expert_width": 32,
        "vocab_size": 512,
    },
    "run": {"steps": 10},
    "data": {"sequence_length": 128},
    "batch": {"sequences": 16, "microbatch": 8},
}


def config_of(*words: str) -> RunConfig:
    return build_config([("test", OmegaConf.create(SMALL)), ("test", OmegaConf.from_dotlist(list(words)))])


def test_command(tmp_path: Path) -> None:
    """Tables on stdout, the same numbers in the file."""
    file = tmp_path / "plan.json"
    words = ["configs/smoke.yaml", "batch.sequences=16", "--gpu", "b200", "--gpus", "2", "--json", str(file)]
    done = subprocess.run([sys.executable, "tools/plan.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("smoke on 2 × b200\n")
    values = json.loads(file.read_text(encoding="utf-8"))
    assert values["mesh"] == {"replicate": 1, "shard": 2, "expert": 1, "expert_shard": 2, "experts_by": "experts"}
    assert values["runs_on"] == [1, 2, 4, 8, 16]
    assert f"{values['memory']['total'] / 1e9:,.2f}" in done.stdout


def test_text_and_values_agree() -> None:
    """The last column of every table is aligned, and totals are sums."""
    config = config_of("parallel.shard=2", "parallel.expert=2", "parallel.replicate=-1")
    plan = make_plan(config, 8)
    values = as_values(plan)
    step = values["steps"][0]
    assert sum(values["memory"]["parts"].values()) == pytest.approx(values["memory"]["total"])
    assert sum(flow["seconds"] for flow in step["traffic"]) == pytest.approx(step["seconds"]["traffic"])
    assert step["mfu"] == step["work"]["model"] / step["seconds"]["step"] / 989e12
    assert step["tokens_per_second_per_gpu"] == 2 * 128 / step["seconds"]["step"]
    text = as_text(plan)
    assert text == describe(config, 8)
    for table in text.split("\n\n")[1:-1]:
        if not table.startswith("warning"):
            first, *lines = map(len, table.splitlines())
            assert max(lines) == first, table  # cells at the end may be empty


def test_recompute_makes_as_much_and_more() -> None:
    """What a forward pass makes does not depend on what is kept of it: five passes over it become seven."""
    none, block = (make_plan(config_of(f"recompute={kind}")).steps[0].seconds.memory for kind in ("none", "block"))
    assert block == pytest.approx(none * 7 / 5, rel=1e-12)


def test_default_number_of_gpus() -> None:
    """As many as the fixed sizes make."""
    assert make_plan(config_of("parallel.shard=2", "parallel.replicate=-1")).gpus == 2
    assert make_plan(config_of()).gpus == 1


def test_length_of_nano_on_one_gpu() -> None:
    """38,147 steps of 524,288 tokens; 75.1 GB of state, and it fits on 141."""
    plan = make_plan(load_config(ROOT / "configs/nano_1gpu.yaml"))
    assert sum(plan.state.values()) / 1e9 == pytest.approx(75.1, abs=0.05)
    assert "38,147" in as_text(plan)
    assert advice.warnings(plan) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["batch.microbatch=8"], "recompute=selective"),
        (["recompute=selective"], "recompute=block"),
        (["recompute=block"], "batch.microbatch=4"),
        (["recompute=block", "batch.microbatch=1"], "--gpus 2"),
        (["recompute=block", "batch.microbatch=1", "parallel.shard=1", "parallel.replicate=-1"], "parallel.shard=2"),
    ],
)
def test_advice_holds(words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU whose memory is just too small for the plan and enough for the change, that change is named."""
    config, gpus = config_of(*words), 8 if "parallel.shard=1" in words else 1
    changed = [*words, expected] if "=" in expected else words
    more = gpus if "=" in expected else 2
    needed = [fullest_moment(config, gpus, "h200").total, fullest_moment(config_of(*changed), more, "h200").total]
    assert needed[1] < needed[0]
    room = (needed[0] + needed[1]) / 2 / advice.USABLE
    monkeypatch.setitem(GPUS, "h200", GPUS["h200"]._replace(memory=room))
    found = [warning for warning in advice.warnings(make_plan(config, gpus)) if "does not fit" in warning]
    assert len(found) == 1
    assert f"; {expected} would, with {needed[1] / 1e9:.1f} GB" in found[0]


def test_no_advice_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is tried would fit in a megabyte."""
    monkeypatch.setitem(GPUS, "h200", GPUS["h200"]._replace(memory=1e6))
    assert "neither recompute" in advice.warnings(make_plan(config_of("batch.sequences=2")))[0]


def test_slow_links_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a larger microbatch where there are several; none on fast links."""
    config = config_of("parallel.shard=2", "parallel.replicate=-1", "batch.microbatch=1")
    monkeypatch.setitem(GPUS, "h200", GPUS["h200"]._replace(nvlink=1e14, network=1e14))
    assert advice.warnings(make_plan(config, 4)) == []
    monkeypatch.setitem(GPUS, "h200", GPUS["h200"]._replace(nvlink=1e6))
    (warning,) = advice.warnings(make_plan(config, 4))
    assert warning.startswith("traffic takes longer than computing")
    assert "batch.microbatch=4 would gather weights once a step in place of 4 times" in warning
    assert "batch.microbatch" not in advice.warnings(make_plan(replace(config, batch=config_of().batch), 4))[0]
