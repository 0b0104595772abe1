"""A run that is killed repeatedly, one rank or all, at any moment, equals an undisturbed run.

Bit for bit if the number of processes stays the same. If it changes, in float64: data, steps and tokens exactly,
floats to the bound of tests/parallel/test_every_mesh.py, 1e-10; after 46 steps on 50 meshes metrics differed by 1e-14
and the state by 3e-13.
"""

import random
import signal
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.training.fault_injection import (
    kill_at_publication,
    kill_before_removal,
    kill_during_deletion,
    kill_while_writing_files,
)
from tests.training.forked_ranks import Fault, Ranks, ranks, run, wait_for
from tests.training.run_files import metrics, state
from tests.training.soak import lines_of
from trinity.checkpoint.directory import CheckpointDirectory

pytestmark = pytest.mark.slow

BOUND = 1e-10
WORDS = ("checkpoint.every=3", "checkpoint.keep=2")


def in_float64(settings: dict) -> dict:
    """The settings in float64, with batches that divide by 1, 2 and 4 ranks."""
    return settings | {
        "precision": {"compute": "float64"},
        "optim": settings["optim"] | {"muon": settings["optim"]["muon"] | {"dtype": "float64"}},
        "batch": {"sequences": 12, "microbatch": 12},
    }


def inside_a_checkpoint(numbers: random.Random, world: int) -> tuple[str, Fault, int]:
    """A random moment of an early save: its name, its fault, and the rank that is killed."""
    files, times = numbers.randint(1, 300), numbers.randint(1, 2)  # a rank writes some 150 tensors in each save
    return numbers.choice(
        [
            ("write", partial(kill_while_writing_files, files), numbers.randrange(world)),
            ("write", partial(kill_while_writing_files, files), numbers.randrange(world)),
            ("publish", partial(kill_at_publication, "COMPLETE", times), 0),
            ("published", partial(kill_at_publication, "COMPLETE", times, after=True), 0),
            ("hint", partial(kill_at_publication, "latest", times), 0),
            ("deletion", partial(kill_during_deletion, "COMPLETE"), 0),
            ("deletion", partial(kill_during_deletion, ".metadata"), 0),
            ("deletion", kill_before_removal, 0),
        ]
    )


def kill_once(settings: dict, world: int, numbers: random.Random) -> tuple[str, str]:
    """Start the run, kill one rank, and then maybe the others; return the moment and what happened to the others."""
    moments = [
        inside_a_checkpoint(numbers, world),
        ("training", nullcontext, numbers.randrange(world)),
        ("starting", nullcontext, numbers.randrange(world)),
    ]
    moment, fault, rank = numbers.choices(moments, weights=[3, 2, 1])[0]
    # ranks that wait for a peer that never started do not end by themselves: the launcher must kill them
    others = "left" if moment != "starting" and numbers.random() < 0.3 else "killed"
    with ranks(settings, (*WORDS, "run.steps=100000"), world, fault, rank) as started:
        if moment == "training":
            wait_for_a_step(started, Path(settings["run"]["dir"]))
        if fault is nullcontext:
            time.sleep(numbers.uniform(0, 0.3 if moment == "training" else 1))
            started.processes[rank].kill()
        started.processes[rank].join()
        if others == "killed":
            started.kill()
        codes = started.wait()
    assert codes[rank] == -signal.SIGKILL, started.log_text()[-3000:]
    assert set(codes) <= {-signal.SIGKILL, 1}
    return moment, others


def wait_for_a_step(started: Ranks, folder: Path) -> None:
    """Wait for the next step of this start."""
    wait_for(lambda: "rows a rank in" in started.log_text(), started)  # metrics.jsonl has been cut back
    before = lines_of(folder / "metrics.jsonl")
    wait_for(lambda: lines_of(folder / "metrics.jsonl") > before, started)


def tail_lines(folder: Path) -> list[int]:
    """Number of lines of each metrics.tail.N.jsonl."""
    count = len(list(folder.glob("metrics.tail.*.jsonl")))
    return [lines_of(folder / f"metrics.tail.{number}.jsonl") for number in range(1, 1 + count)]


def kill_often(settings: dict, kills: int, worlds: tuple[int, ...]) -> Counter:
    """Kill the run `kills` times, each time with another of the numbers of processes; return counts by kind of kill.

    Checks that each start moves the steps after its checkpoint from metrics.jsonl to a tail file.
    """
    folder, numbers, kinds = Path(settings["run"]["dir"]), random.Random(3), Counter()
    world, redone = worlds[0], []
    for _ in range(kills):
        world = numbers.choice([other for other in worlds if other != world] or worlds)
        steps = lines_of(folder / "metrics.jsonl")
        saved = max(CheckpointDirectory.at(folder).complete_steps(), default=0)
        kinds[kill_once(settings, world, numbers)] += 1
        if len(tail_lines(folder)) > len(redone):
            redone.append(steps - saved)
        assert tail_lines(folder) == redone
    return kinds


@pytest.mark.parametrize("worlds", [(1, 2, 4), (2,)], ids=["other numbers of processes", "the same number"])
def test_repeated_kills(settings: dict, tmp_path: Path, worlds: tuple[int, ...]) -> None:
    """No step is missing, doubled or different, and the last state is equal."""
    settings = settings | {"batch": {"sequences": 12, "microbatch": 12}}  # 1, 2 and 4 ranks share it evenly
    if len(worlds) > 1:
        settings |= in_float64(settings)
    kinds = kill_often(settings, 50 if len(worlds) > 1 else 15, worlds)
    assert {moment for moment, _ in kinds} >= {"write", "publish", "deletion", "training"}
    alone, folder = tmp_path / "alone", Path(settings["run"]["dir"])
    last = lines_of(folder / "metrics.jsonl") + 2
    assert run(settings, *WORDS, f"run.steps={last}", world=worlds[-1]) == [0] * worlds[-1]
    undisturbed = settings | {"run": settings["run"] | {"dir": str(alone)}}
    assert run(undisturbed, *WORDS, f"run.steps={last}", world=worlds[0]) == [0] * worlds[0]
    assert [line["step"] for line in metrics(alone)] == list(range(1, last + 1))
    compare(folder, alone, last, bound=BOUND if len(worlds) > 1 else 0)


def compare(run: Path, expected: Path, last: int, bound: float) -> None:
    """All metrics of all steps, and the whole last checkpoint: integers exactly, floats to the bound."""
    assert len(metrics(run)) == last
    for line, expected_line in zip(metrics(run), metrics(expected), strict=True):
        floats = {key: value for key, value in expected_line.items() if isinstance(value, float)}
        floats = {key: pytest.approx(value, rel=bound, abs=bound) for key, value in floats.items()}
        assert line == expected_line | floats
    last_state, expected_state = state(run, last), state(expected, last)
    assert last_state.keys() == expected_state.keys()
    for name, tensor in expected_state.items():
        close = bound if tensor.is_floating_point() else 0
        torch.testing.assert_close(last_state[name], tensor, rtol=close, atol=close, msg=name)
