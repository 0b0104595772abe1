"""Advice of a plan: every advised change is accepted and does what the sentence says."""

import re
from pathlib import Path

import pytest

from tests.planning.plan_configs import config_of, reload
from trinity.config.load import load_config
from trinity.hardware import GPUS
from trinity.planning import advice
from trinity.planning.plan import USABLE_SHARE, make_plan, peak_memory

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["batch.microbatch=1"], "recompute=selective"),
        (["batch.microbatch=1", "recompute=selective", "data.sequence_length=512"], "recompute=block"),
        (["recompute=block"], "batch.microbatch=4"),
        (["recompute=block", "batch.microbatch=1"], "2 GPUs (add --gpus 2)"),
        (["recompute=block", "batch.microbatch=1", "parallel.shard=1", "parallel.replicate=-1"], "parallel.shard=2"),
    ],
)
def test_change_that_fits_is_advised(words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU with memory between the plan's need and the change's, the change is advised."""
    config, gpus = config_of(*words), 8 if "parallel.shard=1" in words else 1
    changed = words if "--gpus" in expected else [*words, expected]
    more = 2 if "--gpus" in expected else gpus
    card = GPUS["h200"]
    needed = [peak_memory(config, gpus, card).total, peak_memory(config_of(*changed), more, card).total]
    assert needed[1] < needed[0]
    room = (needed[0] + needed[1]) / 2 / USABLE_SHARE
    monkeypatch.setitem(GPUS, "h200", GPUS["h200"]._replace(memory=room))
    (warning,) = [warning for warning in advice.warnings(make_plan(config, gpus)) if "does not fit" in warning]
    assert f"; {expected} would, with {needed[1] / 1e9:.1f} GB" in warning


def test_faster_change_is_advised() -> None:
    """If both recompute and smaller microbatches fit, the one whose plan is faster."""
    words = ["batch.microbatch=8", "run.steps=10"]
    now = peak_memory(config_of(*words), 1, GPUS["h200"]).total
    tight = GPUS["h200"]._replace(memory=(now - 1) / USABLE_SHARE)
    seconds = {}
    for word in ("recompute=selective", "batch.microbatch=4"):
        plan = make_plan(config_of(*words, word), 1, tight)
        assert plan.fits
        seconds[word] = plan.total_seconds
    assert len(set(seconds.values())) == 2
    (warning,) = [text for text in advice.warnings(make_plan(config_of(*words), 1, tight)) if "fit" in text]
    assert f"; {min(seconds, key=seconds.get)} would, with" in warning


def test_no_change_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No change fits in a megabyte."""
    monkeypatch.setitem(GPUS, "h200", GPUS["h200"]._replace(memory=1e6))
    (warning,) = advice.warnings(make_plan(config_of("batch.sequences=2")))
    assert warning.endswith("nor more shards nor more GPUs would; batches and streams divide by 2 at most")
    (warning,) = advice.warnings(make_plan(config_of("batch.sequences=1")))
    assert warning.endswith("nor more shards would, and batches and streams divide by no larger number of GPUs than 1")


@pytest.mark.parametrize("words", [[], ["parallel.expert=2"], ["model.experts=64", "model.expert_width=256"]])
def test_gpu_counts_that_cannot_fit_are_not_planned(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What more shards do not lessen is a lower bound of every larger number of GPUs; below it none is planned."""
    words = [*words, "batch.microbatch=1", "batch.sequences=32", "data.streams=32", "recompute=block"]
    config, card = config_of(*words, "parallel.shard=4"), GPUS["h200"]
    plan = make_plan(config, 4, card)
    unsharded = advice._unsharded_bytes(plan, advice.Change([], config, 4))
    larger = [peak_memory(config_of(*words, f"parallel.shard={gpus}"), gpus, card).total for gpus in (8, 16, 32)]
    assert 0 < unsharded < min(larger)
    asked: list[int] = []
    monkeypatch.setattr(advice, "peak_memory", lambda *a: (asked.append(a[1]), peak_memory(*a))[1])
    (warning,) = advice.warnings(make_plan(config, 4, card._replace(memory=unsharded / USABLE_SHARE)))
    assert warning.endswith("nor more GPUs would; batches and streams divide by 32 at most")
    assert set(asked) == {4}


def test_fewest_gpus_are_advised() -> None:
    """GPUs too small for a share of 8 GPUs and large enough for one of 16: 16 are advised, and their plan fits."""
    words = ["batch.microbatch=1", "recompute=block", "parallel.replicate=1", "parallel.shard=1"]
    words += ["model.experts=64", "model.expert_width=1024", "data.sequence_length=16", "parallel.defer_reduce=off"]
    config, card = config_of(*words), GPUS["h200"]
    needed = [peak_memory(config_of(*words, f"parallel.shard={n}"), n, card).total for n in (8, 16)]
    tight = card._replace(memory=sum(needed) / 2 / USABLE_SHARE)
    (warning,) = advice.warnings(make_plan(config, 1, tight))
    expected = "16 GPUs (add --gpus 16 parallel.shard=16)"
    assert warning.endswith(f"; {expected} would, with {needed[1] / 1e9:.1f} GB")
    assert make_plan(reload(config, "parallel.shard=16"), 16, tight).fits


def test_advice_against_exposed_communication() -> None:
    """Fast links: no warning. Slow links: the advised change is accepted and takes the stated share of the time."""
    config = config_of("parallel.shard=2", "parallel.replicate=-1", "batch.microbatch=1")
    fast = GPUS["h200"]._replace(node_link=1e14, network=1e14)
    assert advice.warnings(make_plan(config, 4, fast)) == []
    slow = make_plan(config, 4, fast._replace(node_link=1e7))
    assert advice.exposed_communication(slow) > advice.EXPOSED_LIMIT
    (warning,) = advice.warnings(slow)
    match = re.fullmatch(r"GPUs wait for links during (\d+%).*; (.*) would take (\d+)% of .*", warning)
    assert match
    exposed, words, share = match.groups()
    assert exposed == f"{advice.exposed_communication(slow):.0%}"
    changed = make_plan(reload(config, *words.split()), 4, slow.card)
    assert changed.fits
    assert f"{changed.total_seconds / slow.total_seconds:.0%}" == f"{share}%"
    assert int(share) <= 95


def test_exposed_communication() -> None:
    """By hand, for two segments: step seconds minus computing seconds, over all steps."""
    config = config_of("parallel.shard=2", "batch.ramp=[{tokens: 4096, sequences: 32}]")
    plan = make_plan(config, 2, GPUS["h200"]._replace(node_link=1e7))
    first, second = (step.seconds for step in plan.steps)
    exposed = [seconds.step - seconds.computing for seconds in (first, second)]
    expected = (2 * exposed[0] + 8 * exposed[1]) / (2 * first.step + 8 * second.step)
    assert advice.exposed_communication(plan) == pytest.approx(expected, rel=1e-12)


def test_recompute_turns_compile_off() -> None:
    """trinity.config.check refuses recompute with compile=block, so the advice turns compile off."""
    words = ["batch.microbatch=1", "data.sequence_length=512"]  # activations, not the update, are the peak
    config = config_of("compile=block", *words)
    least = [
        peak_memory(config_of(*words, f"recompute={kind}"), 1, GPUS["h200"]).total for kind in ("selective", "block")
    ]
    (warning,) = advice.warnings(make_plan(config, 1, GPUS["h200"]._replace(memory=sum(least) / 2 / USABLE_SHARE)))
    assert "; recompute=block compile=none would, with" in warning
    assert reload(config, "recompute=block", "compile=none").compile == "none"


def test_rows_that_are_no_multiple_of_the_microbatch() -> None:
    """The plan warns as the run's start does: what is planned are smaller microbatches."""
    (warning,) = advice.warnings(make_plan(load_config(ROOT / "configs" / "nano_1gpu.yaml", ["batch.microbatch=3"])))
    assert warning.startswith("128 rows a rank (batch.sequences=128) are no multiple of batch.microbatch=3")
    assert advice.warnings(make_plan(load_config(ROOT / "configs" / "nano_1gpu.yaml"))) == []
