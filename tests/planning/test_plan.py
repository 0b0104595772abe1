"""The plan as a user meets it: the command, its tables and values, and advice that holds."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trinity.config import load_config
from trinity.config.load import OmegaConf, build_config, to_yaml
from trinity.config.run import RunConfig
from trinity.errors import UserError
from trinity.hardware import GPUS, this_machine
from trinity.parallel.mesh import mesh_words, meshes
from trinity.planning import advice
from trinity.planning.dry_run import dry_run
from trinity.planning.gpus import with_mesh
from trinity.planning.plan import USABLE, fullest_moment, make_plan
from trinity.planning.tables import as_text, as_values, describe

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


def examples() -> list[str]:
    """The command lines that --help shows."""
    docstring = ast.get_docstring(ast.parse((ROOT / "tools/plan.py").read_text(encoding="utf-8")))
    return [line for line in docstring.splitlines() if line.startswith("python ")]


@pytest.mark.slow
@pytest.mark.parametrize("line", examples())
def test_examples_of_the_help(line: str, tmp_path: Path) -> None:
    """As printed, in a folder where --json may write."""
    for name in ("tools", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    words = [sys.executable, *shlex.split(line)[1:]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.match(r"[\w-]+ on \d+ × [\w-]+\n(fits|DOES NOT FIT) ", done.stdout)
    assert ("--json" in line) == (tmp_path / "plan.json").exists()


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
    for table in text.split("\n\n")[2:-1]:
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
        (["batch.microbatch=1"], "recompute=selective"),
        (["batch.microbatch=1", "recompute=selective"], "recompute=block"),
        (["recompute=block"], "batch.microbatch=4"),
        (["recompute=block", "batch.microbatch=1"], "2 GPUs (tools/plan.py --gpus 2)"),
        (["recompute=block", "batch.microbatch=1", "parallel.shard=1", "parallel.replicate=-1"], "parallel.shard=2"),
    ],
)
def test_advice_holds(words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU whose memory is just too small for the plan and enough for the change, that change is named."""
    config, gpus = config_of(*words), 8 if "parallel.shard=1" in words else 1
    changed = words if "--gpus" in expected else [*words, expected]
    more = 2 if "--gpus" in expected else gpus
    card = GPUS["h200"]
    needed = [fullest_moment(config, gpus, card).total, fullest_moment(config_of(*changed), more, card).total]
    assert needed[1] < needed[0]
    room = (needed[0] + needed[1]) / 2 / USABLE
    monkeypatch.setitem(GPUS, "h200", GPUS["h200"]._replace(memory=room))
    found = [warning for warning in advice.warnings(make_plan(config, gpus)) if "does not fit" in warning]
    assert len(found) == 1
    assert f"; {expected} would, with {needed[1] / 1e9:.1f} GB" in found[0]


def test_the_advised_run_is_the_shorter_one() -> None:
    """Where more recompute and smaller microbatches both fit, by the time that their own plans say."""
    words = ["batch.microbatch=8", "run.steps=10"]
    now = fullest_moment(config_of(*words), 1, GPUS["h200"]).total
    tight = GPUS["h200"]._replace(memory=(now - 1) / USABLE)
    seconds = {}
    for word in ("recompute=selective", "batch.microbatch=4"):
        plan = make_plan(config_of(*words, word), 1, tight)
        assert plan.fits
        seconds[word] = plan.total_seconds
    assert len(set(seconds.values())) == 2
    (warning,) = [found for found in advice.warnings(make_plan(config_of(*words), 1, tight)) if "fit" in found]
    assert f"; {min(seconds, key=seconds.get)} would, with" in warning


def test_no_advice_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is tried would fit in a megabyte."""
    monkeypatch.setitem(GPUS, "h200", GPUS["h200"]._replace(memory=1e6))
    (warning,) = advice.warnings(make_plan(config_of("batch.sequences=2")))
    assert warning.endswith("nor more shards nor more GPUs would; batches and streams divide by 2 at most")
    (warning,) = advice.warnings(make_plan(config_of("batch.sequences=1")))
    assert warning.endswith("nor more shards would, and batches and streams divide by no larger number of GPUs than 1")


def test_the_fewest_gpus_are_named() -> None:
    """On cards too small for 8 GPUs' share and large enough for that of 16: 16 are named, with words that fit."""
    words = ["batch.microbatch=1", "recompute=block", "parallel.replicate=1", "parallel.shard=1"]
    words += ["model.experts=64", "model.expert_width=1024", "data.sequence_length=16", "parallel.defer_reduce=off"]
    config, card = config_of(*words), GPUS["h200"]
    needed = [fullest_moment(config_of(*words, f"parallel.shard={n}"), n, card).total for n in (8, 16)]
    tight = card._replace(memory=sum(needed) / 2 / USABLE)
    (warning,) = advice.warnings(make_plan(config, 1, tight))
    expected = "16 GPUs (tools/plan.py --gpus 16 parallel.shard=16)"
    assert warning.endswith(f"; {expected} would, with {needed[1] / 1e9:.1f} GB")
    assert make_plan(reload(config, "parallel.shard=16"), 16, tight).fits


@pytest.mark.parametrize(("gpus", "advised"), [(7, "4 or 8"), (3, "2 or 4"), (5000, "4096")])
def test_counts_for_a_mesh_that_may_be_picked(gpus: int, advised: str) -> None:
    """The nearest below and above that batches and streams divide by come first, although nano's mesh needs 128."""
    config = load_config(ROOT / "configs/nano.yaml")
    with pytest.raises(UserError) as refused:
        make_plan(config, gpus, "h100", pick=True)
    reason = f"batch.sequences=4096 does not divide by {gpus} data ranks"
    assert str(refused.value).startswith(f"{reason}; use --gpus {advised}, or with {gpus} GPUs batch.sequences=")


def test_why_a_mesh_is_replaced() -> None:
    """Words that were given are refused for a reason of their own, which is said."""
    plan = make_plan(config_of("parallel.shard=4", "parallel.expert=3"), 4, pick=True)
    reason = "parallel.expert=3 does not divide shard × context = 4"
    assert as_values(plan)["refusal"] == reason
    assert f"mesh picked    {reason}; planned with: {' '.join(plan.picked)}\n" in as_text(plan)


def reload(config: RunConfig, *words: str) -> RunConfig:
    """The config with words as a user would add them to a command line."""
    raw = OmegaConf.create(to_yaml(config))
    return build_config([("test", raw), ("test", OmegaConf.from_dotlist(list(words)))])


def test_waiting_has_a_threshold_and_a_change_that_helps() -> None:
    """Fast links: nothing is said. Slow ones: the change that is named is accepted and takes as much less time."""
    config = config_of("parallel.shard=2", "parallel.replicate=-1", "batch.microbatch=1")
    fast = GPUS["h200"]._replace(node_link=1e14, network=1e14)
    assert advice.warnings(make_plan(config, 4, fast)) == []
    slow = make_plan(config, 4, fast._replace(node_link=1e9))
    assert advice.waiting(slow) > advice.WAITING
    (warning,) = advice.warnings(slow)
    found = re.fullmatch(r"GPUs wait for links during (\d+%).*; (.*) would take (\d+)% of .*", warning)
    said, words, share = found.groups()
    assert said == f"{advice.waiting(slow):.0%}"
    changed = make_plan(reload(config, *words.split()), 4, slow.card)
    assert changed.fits
    assert f"{changed.total_seconds / slow.total_seconds:.0%}" == f"{share}%"
    assert int(share) <= 95


def test_what_links_cost_is_what_a_step_waits() -> None:
    """By hand, of two stretches: seconds of steps less seconds of computing, over all steps."""
    config = config_of("parallel.shard=2", "batch.ramp=[{tokens: 4096, sequences: 32}]")
    plan = make_plan(config, 2, GPUS["h200"]._replace(node_link=1e9))
    (one, two), idle = plan.steps, []
    for step in plan.steps:
        idle.append(step.seconds.step - step.seconds.computing)
    expected = (2 * idle[0] + 8 * idle[1]) / (2 * one.seconds.step + 8 * two.seconds.step)
    assert advice.waiting(plan) == pytest.approx(expected, rel=1e-12)


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
def test_a_mesh_is_picked(name: str, gpus: int, gpu: str, short: float) -> None:
    """Two layers of the report's models, whose mesh needs 128 GPUs; also with three tenths of the room they need.

    What is printed is added to the command line: the run passes its checks, and the plan of it is the one printed.
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
        card = card._replace(memory=short * plan.memory.total / USABLE)
        plan = make_plan(config, gpus, card, pick=True)
    text = as_text(plan)
    assert f"mesh picked    {reason}; planned with: {' '.join(plan.picked)}\n" in text
    again = make_plan(load_config(path, [*words, *plan.picked]), gpus, card)
    assert (again.sizes, again.memory, again.total_seconds) == (plan.sizes, plan.memory, plan.total_seconds)
    found = re.findall(r"; (.*) would, with ([\d.]+) GB", text)
    assert len(found) == (not plan.fits)
    for advised, needed in found:
        more = int((re.findall(r"--gpus (\d+)", advised) or [gpus])[0])
        settings = [word.removesuffix(")") for word in advised.split() if "=" in word]
        mended = make_plan(load_config(path, [*words, *settings]), more, card)
        assert mended.fits
        assert f"{mended.memory.total / 1e9:.1f}" == needed


def test_the_fastest_that_fits_is_picked() -> None:
    """Of all whose experts are not split or split among all; and where only the leanest fits, that one."""
    config = config_of("parallel.shard=16")
    plan = make_plan(config, 4, pick=True)
    tried = [mesh for mesh in meshes(config.model, 4) if mesh[2] in (1, mesh[1])]
    every = [make_plan(with_mesh(config, mesh_words(config.parallel, *mesh)), 4) for mesh in tried]
    assert plan.total_seconds == min(other.total_seconds for other in every)
    least = sorted({other.memory.total for other in every})
    tight = plan.card._replace(memory=(least[0] + least[1]) / 2 / USABLE)
    assert make_plan(config, 4, tight, pick=True).memory.total == least[0]


def test_verdict_comes_first() -> None:
    """Whether it fits, tokens/s, time and GPU-hours; and what does not fit is said before any table."""
    plan = make_plan(config_of())
    head = as_text(plan).split("\n\n")[0].splitlines()
    assert head[1] == f"fits           {plan.memory.total / 1e9:.1f} of {0.92 * 141:.1f} GB a GPU"
    assert head[2].startswith(f"speed          {plan.tokens_per_second(plan.steps[0]):,.0f} tokens/s a GPU")
    tight = make_plan(config_of(), None, GPUS["h200"]._replace(memory=1e6))
    head = as_text(tight).split("\n\n")[0].splitlines()
    assert head[1].startswith("DOES NOT FIT ")
    assert head[-1].startswith("warning: it does not fit: ")


def test_what_is_compiled_is_not_told_to_recompute() -> None:
    """recompute beside compile=block is refused by trinity.config.check, so the advice turns compile off too."""
    config = config_of("compile=block", "batch.microbatch=1")
    least = [
        fullest_moment(config_of("batch.microbatch=1", f"recompute={kind}"), 1, GPUS["h200"]).total
        for kind in ("selective", "block")
    ]
    (warning,) = advice.warnings(make_plan(config, 1, GPUS["h200"]._replace(memory=sum(least) / 2 / USABLE)))
    assert "; recompute=block compile=none would, with" in warning
    assert reload(config, "recompute=block", "compile=none").compile == "none"


def test_dry_run_plans_this_machine(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict as comments of YAML that can be read; the machine is named; other ranks are silent."""
    config = config_of("parallel.shard=2")
    dry_run(config, to_yaml(config))
    out = capsys.readouterr().out
    assert yaml.safe_load(out.split("\n\n")[0])["parallel"]["shard"] == 2
    machine = this_machine()
    assert out.startswith(f"# trinity on 2 × {machine.name}\n# fits ")
    assert f"# this machine   {machine.name}, {machine.origin}\n" in out
    assert "# note           the mesh needs 2 processes and one was started: planned for 2 like it" in out
    monkeypatch.setenv("RANK", "1")
    dry_run(config, to_yaml(config))
    assert capsys.readouterr().out == ""
