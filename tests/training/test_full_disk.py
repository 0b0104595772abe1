"""A disk that fills up under a run: code 1 and one sentence; with space again, the same command makes the same run.

One checkpoint on a full disk is in test_user_errors.py, one of two ranks in tests/parallel/test_checkpoint_mesh.py.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.file_systems import resize, small_disk
from tests.training.forked_ranks import run
from tests.training.run_files import metrics, status
from trinity.checkpoint.directory import CheckpointDirectory

# file: size of a disk that fills up after the first checkpoint, initial content, settings that make the file longer
RECORDS = {
    "metrics": (4096, "", []),
    "router": (4096, "", ["log.router_every=1"]),
    "events": (4096, json.dumps({"message": "long" * 600}) + "\n", ["evaluation.every=1"]),
}


def metrics_without_evaluation(folder: Path) -> list[dict]:
    """metrics.jsonl without measurements, and without evaluations, which change nothing."""
    return [{k: value for k, value in line.items() if not k.startswith("validation")} for line in metrics(folder)]


def last_messages(folder: Path) -> list[str]:
    """The last lines that the run printed, at most three."""
    return folder.with_suffix(".log").read_text().splitlines()[-3:]


SLOW = [("metrics", 1), ("metrics", 2), ("router", 1), ("router", 2), ("events", 2)]


@pytest.mark.parametrize(
    ("name", "world"),
    [("events", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_a_record_that_cannot_be_written(
    settings: dict, tmp_path: Path, undisturbed: Callable, name: str, world: int
) -> None:
    """The file ends with an incomplete line; all ranks exit with 1, and rank 0 prints the cause."""
    size, first, words = RECORDS[name]
    folder = Path(settings["run"]["dir"])
    folder.mkdir()
    with small_disk(tmp_path / "small", str(size)) as small:
        (small / "record").write_text(first)
        (folder / f"{name}.jsonl").symlink_to(small / "record")
        assert run(settings, *words, world=world) == [1] * world
        assert (small / "record").stat().st_size == size
        *_, before, last = last_messages(folder)
        assert before.startswith(("step ", "rank 0, step "))
        assert last == "error: the disk is full; free some space and run the same command again"
        assert status(folder)["code"] == 1
        checkpoints = CheckpointDirectory.at(folder)
        assert checkpoints.newest_intact() == checkpoints.complete_steps()[-1]
        resize(small, "1m")
        assert run(settings, *words, world=world) == [0] * world
        assert metrics_without_evaluation(folder) == metrics_without_evaluation(undisturbed(world))
        read, unread = lines(folder / f"{name}.jsonl")
        if name == "events":  # the incomplete line stays, as a line of its own
            assert unread == 1
            assert [line.get("kind") for line in read].count("resume") == 1
        else:
            assert unread == 0
            assert [line["step"] for line in read if line["step"]] == list(range(1, 9))


def lines(path: Path) -> tuple[list[dict], int]:
    """The JSON lines of a file, and the number of lines that are not JSON."""
    read, unread = [], 0
    for line in path.read_text().splitlines():
        try:
            read.append(json.loads(line))
        except ValueError:
            unread += 1
    return read, unread


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_export_that_does_not_fit(settings: dict, undisturbed: Callable, world: int) -> None:
    """A full disk under hf/: earlier exports stay, and once there is space a later export is written."""
    folder, words = Path(settings["run"]["dir"]), ["export.every=4"]
    with small_disk(folder / "hf", "280k") as small:
        assert run(settings, *words, world=world) == [1] * world
        assert status(folder)["step"] == 8
        *_, last = last_messages(folder)
        partial = small / ".step_00000008.partial/model.safetensors"
        assert (
            last == f"error: the disk is full while writing {partial}; free some space and run the same command again"
        )
        assert [path.name for path in small.glob("step_*")] == ["step_00000004"]
        assert CheckpointDirectory.at(folder).newest_intact() == 8
        resize(small, "4m")
        assert run(settings, *words, "run.steps=12", world=world) == [0] * world
        assert sorted(path.name for path in small.iterdir()) == ["step_00000004", "step_00000012"]
    assert metrics_without_evaluation(folder)[:8] == metrics_without_evaluation(undisturbed(world))
